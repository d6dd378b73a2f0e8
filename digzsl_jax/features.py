"""Feature rows of a frozen encoder for very many images: encoded once, kept on disk, divided among processes.

Shapes: n image, m image of a process, s process, b batch, h w c pixel, f feature.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import PIL
from jax.experimental import multihost_utils

from digzsl_jax import checkpoint, processes
from digzsl_jax.data.generated import Images
from digzsl_jax.data.pictures import Pictures
from digzsl_jax.logs import Log

SHARD = 2048  # rows of a file: what an interruption costs at most


@dataclasses.dataclass(frozen=True)
class Extractor:
  """Feature rows `[n, f]` of images, in their order; what was encoded before is read.

  Only rows of picture files are kept: arrays are few or drawn anew. A folder of `cache` holds the rows of one list of
  files; its name is the fingerprint of their contents, the encoder and the versions of Pillow and JAX.

  Attributes:
    stream: the encoder, as `cdm.streamed` makes it.
    key: what rows depend on besides the images (JSON-like).
    cache: folder that runs share; None keeps nothing.
  """
  stream: Callable[[np.ndarray | Pictures], Iterator[np.ndarray]]
  key: Mapping[str, Any]
  cache: pathlib.Path | None
  log: Log

  def __call__(self, images_nhwc: np.ndarray | Pictures) -> np.ndarray:
    return divided(self._rows, images_nhwc)

  def plain(self, images_nhwc: np.ndarray | Images, name: str) -> np.ndarray:
    """The same of images that are not kept; `name` is that of the progress bar."""
    return divided(functools.partial(encode, self.stream, self.log, name), images_nhwc)

  def _rows(self, images_nhwc: np.ndarray | Pictures) -> np.ndarray:
    n, folder = len(images_nhwc), None
    if self.cache and isinstance(images_nhwc, Pictures):
      contents = [file.digest.hex() for file in images_nhwc.files]
      size = images_nhwc.size if images_nhwc.fit == "crop" else [images_nhwc.size, images_nhwc.fit]
      folder = self.cache / checkpoint.fingerprint({
          **self.key, "versions": (jax.__version__, PIL.__version__), "size": size, "files": contents})
    found = list(_read(folder, n)) if folder else []
    if done := sum(map(len, found)):
      self.log.say(f"features: {done} of {n} rows are in {folder}")
    if done < n:
      rest = images_nhwc.take(slice(done, None)) if folder else images_nhwc
      with self.log.progress(n, "features", done) as bar:
        for rows_bf in self._shards(rest, bar.update):
          found.append(rows_bf)
          if folder:
            self._keep(folder / f"{done:08}.safetensors", rows_bf)
          done += len(rows_bf)
    return np.concatenate(found)

  def _shards(self, images_nhwc: np.ndarray | Pictures, report: Callable[[int], Any]) -> Iterator[np.ndarray]:
    """Rows in pieces of at least `SHARD`, the last one smaller; `report` gets the rows of every batch."""
    pending = []
    for rows_bf in self.stream(images_nhwc):
      report(len(rows_bf))
      pending.append(rows_bf)
      if sum(map(len, pending)) >= SHARD:
        yield np.concatenate(pending)
        pending = []
    if pending:
      yield np.concatenate(pending)

  def _keep(self, path: pathlib.Path, rows_bf: np.ndarray) -> None:
    try:
      checkpoint.write_arrays(path, {"features": rows_bf})
    except OSError as error:  # costs time alone
      self.log.warn(f"features are not kept: {error}; config.cdm.cache names another folder, or none")


def encode(stream: Callable, log: Log, name: str, images_nhwc: np.ndarray | Images) -> np.ndarray:
  """Rows `[n, f]` of a `stream`, as `cdm.streamed` makes it, under a progress bar called `name`."""
  rows = []
  with log.progress(len(images_nhwc), name) as bar:
    for rows_bf in stream(images_nhwc):
      rows.append(rows_bf)
      bar.update(len(rows_bf))
  return np.concatenate(rows)


def divided(encode: Callable[[Any], np.ndarray], images_nhwc: np.ndarray | Pictures | Images) -> np.ndarray:
  """`encode(images)`, `[n, f]`, of which every process does its share; all of them call it."""
  hosts, n = jax.process_count(), len(images_nhwc)
  if hosts == 1:
    return encode(images_nhwc)
  mine = share(n, jax.process_index(), hosts)
  rows_mf = encode(images_nhwc[mine] if isinstance(images_nhwc, np.ndarray) else images_nhwc.take(mine))
  processes.meet()  # a collective does not wait for long
  return merge(multihost_utils.process_allgather(rows_mf), n)


def share(n: int, index: int, hosts: int) -> np.ndarray:
  """Rows that a process encodes: as many in each, so the last row may be encoded by several."""
  return np.minimum(np.arange(index, -(-n // hosts) * hosts, hosts), n - 1)


def merge(rows_smf: np.ndarray, n: int) -> np.ndarray:
  """The rows of every process's `share` in the order of the `n` images."""
  return rows_smf.swapaxes(0, 1).reshape(-1, rows_smf.shape[-1])[:n]


def _read(folder: pathlib.Path, n: int) -> Iterator[np.ndarray]:
  """The leading rows that are there without a gap."""
  done = 0
  while done < n and (path := folder / f"{done:08}.safetensors").is_file():
    rows_bf = checkpoint.read_arrays(path)["features"]
    yield rows_bf
    done += len(rows_bf)
