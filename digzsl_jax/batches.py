"""Batches of a training set in an order that the step alone decides, made while the device works.

Shapes: n image, b image of a batch.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")
AHEAD = 2  # batches that are made while one is used


def rows(n: int, batch: int, seed: int, step: int) -> np.ndarray:
  """`[b]`: what the update after `step` others sees; each epoch shuffles anew and leaves out what fills no batch."""
  epoch, place = divmod(step, n // batch)
  return _shuffled(n, seed, epoch)[place * batch:(place + 1) * batch]


@functools.lru_cache(maxsize=2)
def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(n)


def behind(results: Iterable[T]) -> Iterator[T]:
  """Each result once the next one has been asked for, which a device then works on while this one is read."""
  waiting = collections.deque()
  for result in results:
    waiting.append(result)
    if len(waiting) > 1:
      yield waiting.popleft()
  yield from waiting


def ahead(make: Callable[[int], Any], steps: range) -> Iterator[Any]:
  """`make(step)` of each step in turn, a few of them made in another thread before they are asked for."""
  with concurrent.futures.ThreadPoolExecutor(1, "batches") as maker:
    making = collections.deque()
    try:
      for step in steps:
        making.append(maker.submit(make, step))
        if len(making) > AHEAD:
          yield making.popleft().result()
      while making:
        yield making.popleft().result()
    finally:
      for future in making:
        future.cancel()


def mine(rows_b: np.ndarray) -> np.ndarray:
  """The part of a batch that this process makes."""
  size = len(rows_b) // jax.process_count()
  return rows_b[jax.process_index() * size:][:size]


def place(batch: Any, sharding: jax.sharding.NamedSharding) -> Any:
  """Arrays that each process has a part of, as arrays over all devices."""
  return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)
