"""Times benches one after another; every one is a line in `bench.jsonl`."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from digzsl_jax import checkpoint, logs, mesh
from digzsl_jax.base_workspace import check, parse
from digzsl_jax.bench import measure, peers, sizes
from digzsl_jax.bench.steps import BENCHES, Bench
from digzsl_jax.models import layers
from digzsl_jax.verify.parts import Memory

SECTIONS = {"method", "stages", "mesh", "bench"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How benches are timed.

  Attributes:
    sizes: out of "tiny", "sd15" and "sd21"; "full" is the last two.
    dtype: of the models, as `config.models.dtype`.
    batch: of a device in every bench; 0 for the size's own.
    steps: of samplers and trainings; 0 for the size's own.
    repetitions: timed calls after the first.
    seconds: no further repetition begins after so many.
    second_start: also time the first call of a second process, which finds the programs of the first one compiled.
    compare: "torch" (eager) or "torch_compile" (denoiser compiled, on GPUs channels last) for PyTorch beside us; with
      "torch_batched" and "torch_batched_compile" its `tokens` take all classes and pictures at once; "" for none.
    out: file that lines are appended to; "" for `bench.jsonl` in the working directory.
  """

  sizes: tuple[str, ...] = ("tiny",)
  dtype: str = "float32"
  batch: int = 0
  steps: int = 0
  repetitions: int = 10
  seconds: float = 60.0
  second_start: bool = True
  compare: str = ""
  out: str = ""

  def __post_init__(self):
    for size in self.expanded:
      check(size in sizes.SIZES, "sizes", size, f"out of {(*sizes.SIZES, 'full')}")
    check(self.dtype in layers.DTYPES, "dtype", self.dtype, f"one of {layers.DTYPES}")
    check(min(self.batch, self.steps) >= 0, "batch or steps", (self.batch, self.steps), "0 (the size's own) or more")
    check(self.repetitions >= 1, "repetitions", self.repetitions, "at least 1")
    check(self.seconds > 0, "seconds", self.seconds, "positive")
    check(self.compare in peers.COMPARE, "compare", self.compare, f"one of {peers.COMPARE}")

  @property
  def expanded(self) -> list[str]:
    """`sizes` one by one; on a command line several arrive as one string."""
    named = [name for entry in self.sizes for name in entry.split(",")]
    return list(dict.fromkeys(size for name in named for size in (sizes.FULL if name == "full" else (name,))))


def run(config: Mapping[str, Any], workdir: pathlib.Path, log: logs.Log, dry_run: bool) -> None:
  """Times what `config["stages"]` names, at every size.

  Raises:
    ValueError: a section, bench or setting is unknown or impossible, or answers differ from the peer's.
  """
  if wrong := set(config) ^ SECTIONS:
    raise ValueError(f"config has unknown or lacks sections {sorted(wrong)}; known are {sorted(SECTIONS)}")
  settings = parse(Settings, config["bench"], "bench")
  names = checkpoint.choose(config["stages"], BENCHES)
  devices = mesh.make(config["mesh"]["devices"])
  peers.check(settings.compare, settings.dtype)
  if jax.process_count() > 1:
    raise ValueError("a bench is of one process; start it on one host")
  if not dry_run:
    logs.write_provenance(workdir, config)
  out = pathlib.Path(settings.out or workdir / "bench.jsonl").expanduser()
  peak = None if dry_run else measure.product_speed(devices, settings.dtype)
  if peak:
    log.say(f"products of matrices reach {peak.wall:.3g} TFLOP/s in {settings.dtype}")
  for size in settings.expanded:
    made = sizes.SIZES[size]()
    models = sizes.Models(made, settings.dtype)
    for name in names:
      if size == "sd21" and name not in sizes.SD_ALONE:
        log.say(f"{name} {size}: the same as of sd15, left out")
        continue
      log.say(f"{name} {size}: making weights and inputs")
      bench = BENCHES[name](sizes.Place(made, models, devices, settings.batch, settings.steps))
      if dry_run:
        print_costs(f"{name} {size}", bench)
        continue
      for line in timed(Timing(name, size, bench, models, devices, settings, peak, log)):
        append(out, line)
      del bench
  if not dry_run:
    log.say(f"lines are in {out}; `python -m digzsl_jax.report --bench {out}` makes a table")


def print_costs(title: str, bench: Bench) -> None:
  """What a call is, without making any."""
  flop = bench.flop([])
  print(f"{title}: batch {bench.batch}, steps {bench.steps}, {bench.images} images"
        + (f", {flop / 1e12:.4g} TFLOP" if flop else ""))
  for lowered in bench.lower():
    print(f"  {logs.memory_and_flops(lowered.compile())} by XLA's own count")


@dataclasses.dataclass(frozen=True)
class Timing:
  """A bench and where it runs; `peak` is what products of matrices reach."""

  name: str
  size: str
  bench: Bench
  models: sizes.Models
  devices: jax.sharding.Mesh
  settings: Settings
  peak: measure.Speed
  log: logs.Log

  @property
  def title(self) -> str:
    return f"{self.name} {self.size}"


def timed(timing: Timing) -> Iterator[dict[str, Any]]:
  """Ours, and the peer's where there is one; a line is printed and given out when it is whole."""
  bench, settings, memory = timing.bench, timing.settings, Memory()
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    cache, exchange = pathlib.Path(folder) / "cache", pathlib.Path(folder) / "exchange"
    stack.enter_context(measure.compilation_cache_in(cache))
    memory.reset()
    call, result, first = measure.first_call(bench)
    answer, flop = bench.answer(result), bench.flop(result)
    timing.log.say(f"{timing.title}: first call {first.seconds:.2f} s, {first.compile_seconds:.2f} s of it compiling")
    del result
    peer, error = None, None
    if settings.compare and timing.name not in peers.WITHOUT:
      peer = peers.Peer(timing.name, bench, timing.models, settings.compare, settings.dtype, exchange)
      stack.enter_context(peer)
      error = peers.agreement(timing.name, answer, peer.answer, settings.dtype)
      timing.log.say(f"{timing.title}: answers differ from PyTorch's by {error:.1e} of their norm")
    sides = [lambda: measure.once(call), *([peer.call] if peer else [])]
    ours, *theirs = measure.repeat(sides, settings.repetitions, settings.seconds)
    load, resident = measure.load(), memory.peak()
    held, source = measure.peak_memory(timing.devices, bench.lower())
    warm = second_start(timing, cache) if settings.second_start else None
  speed = speeds(timing, ours, flop)
  line = common(timing, "digzsl_jax", load) | speed | {
      "compile_seconds": first.compile_seconds, "first_call_seconds": first.seconds,
      "first_call_seconds_warm": warm and warm["seconds"], "peak_memory_gib": held, "peak_memory_source": source,
      "peak_rss_gib": resident, "versions": logs.versions(), "flags": os.environ.get("XLA_FLAGS", ""),
      "relative_error": error}
  if not peer:
    yield line
    return
  other = speeds(timing, theirs[0], flop)
  ratios = {"ratio": other["p50_ms"] / speed["p50_ms"],
            "cpu_ratio": other["cpu_p50_ms"] / speed["cpu_p50_ms"] if speed["cpu_p50_ms"] else None}
  timing.log.say(f"{timing.title}: {ratios['ratio']:.2f} times as fast as {settings.compare}")
  yield line | ratios
  yield common(timing, settings.compare, load) | other | peer.facts | {"relative_error": error, "flags": ""}


def common(timing: Timing, implementation: str, load: float | None) -> dict[str, Any]:
  """What both sides' lines share."""
  return {"bench": timing.name, "size": timing.size, "implementation": implementation,
          "device": timing.devices.devices.flat[0].device_kind, "platform": timing.devices.devices.flat[0].platform,
          "device_count": timing.devices.size, "cores": os.cpu_count(), "dtype": timing.settings.dtype,
          "batch": timing.bench.batch, "steps": timing.bench.steps, "images": timing.bench.images, "load1": load,
          "git": logs.versions().get("git"), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def speeds(timing: Timing, times: measure.Times, flop: int | None) -> dict[str, Any]:
  """Percentiles, rates and shares of what the device could do; the virtual devices of a CPU are one chip."""
  found = times.percentiles()
  seconds = found["p50_ms"] / 1000
  chips = 1 if timing.devices.devices.flat[0].platform == "cpu" else timing.devices.size
  sheet, rate = measure.datasheet_tflops(timing.devices, timing.settings.dtype), flop and flop / 1e12 / seconds
  return {"repetitions": len(times.wall), **found, "images_per_second_per_chip": timing.bench.images / seconds / chips,
          "tflop": flop and flop / 1e12, "mfu_datasheet": rate / sheet if rate and sheet else None,
          "mfu_measured": rate / timing.peak.wall if rate else None,
          "mfu_cpu": flop / 1e9 / found["cpu_p50_ms"] / timing.peak.cpu if rate and timing.peak.cpu else None,
          "product_tflops": timing.peak.wall}


def second_start(timing: Timing, cache: pathlib.Path) -> dict[str, float] | None:
  """`First` of another process with the same compilation cache; None where it does not come so far."""
  settings, count = timing.settings, timing.devices.size
  spec = {"bench": timing.name, "size": timing.size, "dtype": settings.dtype, "batch": settings.batch,
          "steps": settings.steps, "devices": count, "precision": jax.config.jax_default_matmul_precision}
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  if jax.config.jax_num_cpu_devices > 0:
    environment["JAX_NUM_CPU_DEVICES"] = str(jax.config.jax_num_cpu_devices)
  done = subprocess.run([sys.executable, "-m", "digzsl_jax.bench.second", json.dumps(spec)], env=environment,
                        stdout=subprocess.PIPE, text=True)
  if done.returncode:  # as where a device is one process's alone
    timing.log.warn(f"{timing.title}: a second start ended with status {done.returncode}; it is not timed")
    return None
  first = json.loads(done.stdout.splitlines()[-1])
  timing.log.say(f"{timing.title}: first call of a second start {first['seconds']:.2f} s")
  return first


def append(out: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Writes and prints a line of JSON."""
  rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in line.items()}
  text = json.dumps(rounded)
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open("a", encoding="utf-8") as file:
    file.write(text + "\n")
  print(text, flush=True)
