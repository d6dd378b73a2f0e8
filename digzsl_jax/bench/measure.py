"""Times, memory and the speed that a device reaches at all."""

import contextlib
import gc
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from digzsl_jax.bench.steps import Bench

# Dense bfloat16 TFLOP/s in the makers' data sheets by `device_kind`; what is not there has none in the table.
DATASHEET = {
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
    "NVIDIA L4": 121, "NVIDIA L40S": 362,
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v5p": 459, "TPU v6 lite": 918,
    "TPU v6e": 918}
COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the program comes out of the cache
PRODUCTS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # rows and columns of the matrices


class First(NamedTuple):
  """The first call in a process."""

  seconds: float  # tracing, compiling and running
  compile_seconds: float


class Speed(NamedTuple):
  """TFLOP in a second of all devices, and in a CPU-second where these are a CPU."""

  wall: float
  cpu: float | None


class Times(NamedTuple):
  """Repetitions, in seconds."""

  wall: list[float]
  cpu: list[float]  # of all threads of the process

  def percentiles(self) -> dict[str, float]:
    """In milliseconds."""
    p10, p50, p90 = np.percentile(self.wall, (10, 50, 90)) * 1000
    return {"p10_ms": p10, "p50_ms": p50, "p90_ms": p90, "cpu_p50_ms": float(np.median(self.cpu)) * 1000}


@contextlib.contextmanager
def compilation_cache_in(folder: pathlib.Path) -> Iterator[None]:
  """Keeps compiled programs in `folder` for a while and forgets those of before."""
  before = jax.config.jax_compilation_cache_dir

  def use(place: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", place)
    compilation_cache.reset_cache()  # else the folder of the first compilation stays

  use(str(folder))
  jax.clear_caches()
  try:
    yield
  finally:
    use(before)


def first_call(bench: Bench) -> tuple[Callable[[], Any], Any, First]:
  """`(call, its first result, what that took)`."""
  spent = []

  def listen(event: str, seconds: float, **_) -> None:
    if event == COMPILED:
      spent.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  began = time.perf_counter()
  try:
    call = bench.start()
    result = jax.block_until_ready(call())
    seconds = time.perf_counter() - began
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return call, result, First(seconds, sum(spent))


def once(call: Callable[[], Any]) -> tuple[float, float]:
  """Wall-clock and CPU seconds of a call."""
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(call())
  return time.perf_counter() - wall, time.process_time() - cpu


def repeat(calls: list[Callable[[], tuple[float, float]]], repetitions: int, seconds: float) -> list[Times]:
  """Times of several calls that take turns, until there are enough or the time is up; at least one of each."""
  found, began = [Times([], []) for _ in calls], time.perf_counter()
  gc.collect()
  for done in range(repetitions):
    if done and time.perf_counter() - began > seconds:
      break
    for times, call in zip(found, calls):
      for spent, one in zip(times, call()):
        spent.append(one)
  return found


def product_speed(devices: jax.sharding.Mesh, dtype: str) -> Speed:
  """What products of large matrices reach on all devices at once, at their best of some."""
  side = PRODUCTS.get(devices.devices.flat[0].platform, 2048)
  kind = jnp.float32 if dtype == "float32" else jnp.bfloat16
  rows = jax.sharding.PartitionSpec(devices.axis_names[0])
  random = np.random.default_rng(0).normal(size=(1, side, side)).astype(np.float32)  # of zeros it would be quicker
  place = jax.sharding.NamedSharding(devices, rows)
  a_nij = jax.device_put(jnp.tile(jnp.asarray(random, kind), (devices.size, 1, 1)), place)
  dot = lambda a_nij: jax.lax.dot(a_nij[0], a_nij[0], preferred_element_type=jnp.float32)[None]
  run = jax.jit(jax.shard_map(dot, mesh=devices, in_specs=rows, out_specs=rows, check_vma=False))
  jax.block_until_ready(run(a_nij))
  wall, cpu = (min(spent) for spent in zip(*(once(lambda: run(a_nij)) for _ in range(8))))
  tflop = devices.size * 2 * side**3 / 1e12
  return Speed(tflop / wall, tflop / cpu if devices.devices.flat[0].platform == "cpu" else None)


def datasheet_tflops(devices: jax.sharding.Mesh, dtype: str) -> float | None:
  """Of all devices; None for what the table lacks, and for float32, which devices compute in several ways."""
  peak = DATASHEET.get(devices.devices.flat[0].device_kind)
  return None if peak is None or dtype == "float32" else peak * devices.size


def peak_memory(devices: jax.sharding.Mesh, lowered: list[jax.stages.Lowered]) -> tuple[float | None, str | None]:
  """GiB of one device and where they come from.

  Devices that count tell the most that they held since the process began; of others it is what the largest compiled
  step needs.
  """
  stats = [device.memory_stats() or {} for device in devices.devices.flat]
  if all("peak_bytes_in_use" in of_device for of_device in stats):
    return max(of_device["peak_bytes_in_use"] for of_device in stats) / 2**30, "device.memory_stats, since the start"
  sizes = [step.compile().memory_analysis() for step in lowered]
  needed = [size.temp_size_in_bytes + size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
            for size in sizes if size is not None]
  return (max(needed) / 2**30, "compiled.memory_analysis") if needed else (None, None)


def load() -> float | None:
  """Of the last minute."""
  return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
