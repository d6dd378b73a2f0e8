"""What a run tells: one line per stage, progress bars, `metrics.jsonl`, versions, parameter tables.

Of several processes the first one speaks and writes; of the others only warnings are heard.
"""

import importlib.metadata
import json
import math
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import tqdm
from flax import nnx

from digzsl_jax import files, processes

PACKAGES = ("digzsl_jax", "jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "tokenizers")
COLLECTIVES = re.compile(r" (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\(")


class Log:
  """Appends scalars to `metrics.jsonl` and speaks to the person who waits."""

  def __init__(self, workdir: pathlib.Path | None):
    """Without a `workdir` there is nowhere for metrics."""
    if workdir is not None:
      workdir.mkdir(parents=True, exist_ok=True)
      self._file = workdir / "metrics.jsonl"
    self._start = time.monotonic()

  def say(self, text: str) -> None:
    """One line for people, with the seconds since the start."""
    if processes.is_first():
      self._write(text)

  def warn(self, text: str) -> None:
    self._write(f"warning: {text}" if processes.is_first() else f"warning of process {processes.index()}: {text}")

  def _write(self, text: str) -> None:
    tqdm.tqdm.write(f"[{time.monotonic() - self._start:6.1f}s] {text}", file=sys.stderr)

  def metrics(self, stage: str, step: int, **scalars: float) -> None:
    """Appends one JSON line; a resumed run may repeat steps, the last line of a step counts."""
    if processes.is_first():
      with self._file.open("a") as file:
        file.write(json.dumps({"stage": stage, "step": step, **scalars}) + "\n")

  def progress(self, total: int, name: str, done: int = 0) -> tqdm.tqdm:
    """A bar with rate and time left; silent on fast work and, but for a line a minute, when not a terminal."""
    return tqdm.tqdm(total=total, initial=done, desc=name, leave=False, dynamic_ncols=True, file=sys.stderr,
                     disable=not processes.is_first(), mininterval=0.5 if sys.stderr.isatty() else 60, smoothing=0.1)


def write_provenance(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes the resolved config and the versions of what the numbers depend on."""
  if not processes.is_first():
    return
  files.write_json(workdir / "config.json", config)
  files.write_json(workdir / "versions.json", versions())


def versions() -> dict[str, str]:
  """Versions of what numbers depend on; `git` is the commit when run from a checkout."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  root = pathlib.Path(__file__).parent.parent
  try:
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True,
                         text=True, check=True)
  except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
    return found
  return found | {"git": git.stdout.strip()}


def devices(used: Iterable[jax.Device]) -> str:
  """As "8 x NVIDIA H200"."""
  used = list(used)
  return f"{len(used)} x {', '.join(sorted({device.device_kind for device in used}))}"


def parameter_table(modules: Mapping[str, nnx.Module]) -> str:
  """Parameter counts of modules and of their parts."""
  counts: dict[str, int] = {}
  for name, module in modules.items():
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
      for level in range(2):
        key = ".".join([name, *map(str, path[:-1])][:level + 1])
        if level < len(path):
          counts[key] = counts.get(key, 0) + math.prod(leaf.shape)
  width = max(map(len, counts), default=0)
  return "\n".join(f"{name:<{width}}  {count:>13,}" for name, count in counts.items())


def memory_and_flops(compiled: jax.stages.Compiled) -> str:
  """What XLA says of a compiled step: GFLOP, memory of a device in MiB, and collectives, if any, among devices."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  text = f"{cost.get('flops', float('nan')) / 1e9:.2f} GFLOP"
  if memory is not None:
    text += (f", {memory.temp_size_in_bytes / 2**20:.1f} MiB temporary, "
             f"{memory.argument_size_in_bytes / 2**20:.1f} MiB arguments")
  return f"{text}, {len(COLLECTIVES.findall(compiled.as_text()))} collectives"
