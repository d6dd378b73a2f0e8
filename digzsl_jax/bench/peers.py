"""PyTorch beside us: a process that waits for its turn."""

import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from digzsl_jax import checkpoint, files
from digzsl_jax.bench.sizes import Models
from digzsl_jax.bench.steps import Bench

COMPARE = ("", "torch", "torch_compile", "torch_batched", "torch_batched_compile")
WITHOUT = ("tagclip",)  # benches that no peer knows
NEEDS = ("torch", "diffusers", "transformers")
# Largest |ours - theirs| / |theirs|, Euclidean norms.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
MARK = "@peer "  # of lines that are for us


def check(compare: str, dtype: str) -> None:
  """Raises ValueError if the peer cannot run here."""
  if not compare:
    return
  if dtype not in BOUNDS:
    raise ValueError(f"compare is {compare!r}, but PyTorch has no dtype {dtype!r}; use one of {tuple(BOUNDS)}")
  if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
    raise ValueError(f"compare is {compare!r}, but {', '.join(absent)} not installed: pip install torch==2.13.0, then "
                     "pip install 'digzsl_jax[oracle]'; or compare nothing, \"\"")


class Peer:
  """A bench in PyTorch, in a process of its own.

  Attributes:
    answer: of its first call.
    facts: what the process says of itself: versions, first call, device.
  """

  def __init__(self, name: str, bench: Bench, models: Models, compare: str, dtype: str, folder: pathlib.Path):
    """Hands weights and inputs over in `folder` and waits for the first call.

    Raises:
      ValueError: the process ended before that; what it said stands on the screen.
    """
    models.write(folder, bench.parts)
    checkpoint.write_arrays(folder / "inputs.safetensors", bench.inputs)
    facts = {"bench": name, "dtype": dtype, "compiled": compare.endswith("compile"), "batched": "batched" in compare}
    files.write_json(folder / "facts.json", facts | dict(bench.facts))
    self._process = subprocess.Popen([sys.executable, "-m", "digzsl_jax.bench.reference", str(folder)], text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    self.facts = self._listen()
    self.answer = checkpoint.read_arrays(folder / "answer.safetensors")

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *_) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def call(self) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call."""
    print("call", file=self._process.stdin, flush=True)
    said = self._listen()
    self.facts["peak_rss_gib"] = said["peak_rss_gib"]
    return said["seconds"], said["cpu_seconds"]

  def _listen(self) -> dict[str, Any]:
    for line in self._process.stdout:
      if line.startswith(MARK):
        return json.loads(line.removeprefix(MARK))
    raise ValueError(f"PyTorch's side ended with status {self._process.wait()}; its message stands above")


def agreement(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], dtype: str) -> float:
  """The largest relative error of the answers.

  Raises:
    ValueError: it is above `BOUNDS`, or the answers are not alike.
  """
  if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
    shapes = [{key: array.shape for key, array in side.items()} for side in (ours, theirs)]
    raise ValueError(f"bench {name}: ours are {shapes[0]}, PyTorch's {shapes[1]}")
  norm = lambda array: np.linalg.norm(array.astype(np.float64))
  errors = {key: norm(ours[key] - theirs[key]) / norm(theirs[key]) for key in ours}
  worst = max(errors, key=errors.get)
  if not errors[worst] <= BOUNDS[dtype]:  # NaN is not
    raise ValueError(f"bench {name}: {worst} differs from PyTorch's by {errors[worst]:.2g} of its norm, above "
                     f"{BOUNDS[dtype]:g}; times of different computations are not compared")
  return float(errors[worst])
