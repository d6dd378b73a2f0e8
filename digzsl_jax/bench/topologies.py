"""Compiles production's steps for TPUs that are not there: `python -m digzsl_jax.bench.topologies --topology v5e:4x4`.

It needs `libtpu` (`pip install jax[tpu]`) and no TPU: the compiler is given a topology, a program for every chip comes
out and is never run. So it tells whether a program compiles, what it holds in a chip's memory, and what chips exchange.
It tells no speed: FLOP are the compiler's own count, in which the body of a loop counts once.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from digzsl_jax import cli, logs, mesh
from digzsl_jax.bench import ahead, measure, run, sizes
from digzsl_jax.models import layers, platforms

CPU = "cpu"  # in place of a topology: this process's own devices, to try the command
# GiB of a chip in the makers' data sheets by `device_kind`; the compiler keeps a little for itself.
MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
# How XLA refuses a program: of all that it holds, or already of its temporaries.
TOO_LARGE = re.compile(
    r"(?:Used |temporaries \()([\d.]+)([KMGT]?)\)?(?: of| exceeds available HBM) \(?([\d.]+)([KMGT]?)")
# Of the compiler's library, where the environment is silent: not to ask a cloud host's metadata what the host is, which
# does not matter, and to stand beside a program that uses this host's TPUs, or another compilation.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
               "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
PARTS = {"argument": "arguments", "temp": "temporary", "output": "outputs", "generated_code": "code"}
UNITS = {"": 2**-30, "K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}  # in GiB


def chips(topology: str) -> jax.sharding.Mesh:
  """All devices of `topology`, such as "v5e:4x4", in production's mesh.

  Raises:
    ValueError: the compiler is not there or knows no such topology.
  """
  if topology == CPU:
    return mesh.make(0)
  os.environ.update(ENVIRONMENT | os.environ)
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except Exception as error:  # jax raises RuntimeError, NotImplementedError and XLA's own
    raise ValueError(f"--topology is {topology!r}: {' '.join(str(error).split())[:300]}; known are names such as "
                     "v5e:4x4, v5p:2x2x2 and v6e:16x16, with `pip install jax[tpu]`") from error
  return jax.sharding.Mesh(np.array(found), (mesh.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def compile_for(program: ahead.Program, devices: jax.sharding.Mesh) -> dict[str, Any]:
  """What the compiler says of a program; `fits` is False where it refuses it for its memory."""
  kind, began = devices.devices.flat[0], time.perf_counter()
  with platforms.tracing_for(kind.platform):
    lowered = program.lower()
  traced, cpu = time.perf_counter(), time.process_time()
  spent = lambda: {"compile_seconds": time.perf_counter() - traced, "compile_cpu_seconds": time.process_time() - cpu}
  line = {"program": program.name, "images_per_chip": program.images, "device": kind.device_kind, "chips": devices.size,
          "memory_gib": MEMORY.get(kind.device_kind), "trace_seconds": traced - began}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if not (said := TOO_LARGE.search(str(error))):
      raise
    used, unit, limit, unit_of_limit = said.groups()
    return line | {"fits": False, "needed_gib": float(used) * UNITS[unit],
                   "limit_gib": float(limit) * UNITS[unit_of_limit], **spent(), "refused": str(error)[:4000]}
  line |= {"fits": True, **spent(), **held(compiled)}
  return line | {"collectives": len(logs.COLLECTIVES.findall(compiled.as_text())),
                 "compiler_gflop": (compiled.cost_analysis() or {}).get("flops", 0) / 1e9}


def held(compiled: jax.stages.Compiled) -> dict[str, float]:
  """GiB of a device by kind; what is given out in place of an argument counts once."""
  memory = compiled.memory_analysis()
  kinds = {name: getattr(memory, f"{name}_size_in_bytes") / 2**30
           for name in (*PARTS, "alias")}
  return {"total_gib": sum(kinds.values()) - 2 * kinds["alias"], **{f"{name}_gib": gib for name, gib in kinds.items()}}


def said(title: str, line: dict[str, Any]) -> str:
  """One line for people."""
  head, seconds = f"{title} {line['program']}, {line['images_per_chip']} images", f"{line['compile_seconds']:.0f} s"
  if not line["fits"]:
    return f"{head}: DOES NOT FIT, {line['needed_gib']:.2f} of {line['limit_gib']:.2f} GiB, {seconds}"
  parts = ", ".join(f"{line[f'{kind}_gib']:.2f} {name}" for kind, name in PARTS.items())
  return f"{head}: {line['total_gib']:.2f} GiB ({parts}), {line['collectives']} collectives, {seconds}"


def parser() -> argparse.ArgumentParser:
  new = argparse.ArgumentParser(prog="python -m digzsl_jax.bench.topologies",
                                description="Compiles production's steps for TPUs that are not there.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  new.add_argument("--topology", nargs="+", default=["v5e:4x4"],
                   help=f"chips, as v5e:16x16, v5p:2x2x2 or v6e:4x4; {CPU} for this host's")
  new.add_argument("--size", choices=list(sizes.SIZES), default="sd15", help="of the models")
  new.add_argument("--stages", nargs="+", choices=list(ahead.PROGRAMS), default=list(ahead.PROGRAMS), help="stages")
  new.add_argument("--only", nargs="+", default=[], help="programs out of those of the stages, as learn; else all")
  new.add_argument("--batch", nargs="+", type=cli.at_least(0), default=[0],
                   help="of a chip: classes for tokens, else images; 0 for the size's own")
  new.add_argument("--dtype", choices=layers.DTYPES, default="bfloat16", help="of the models")
  new.add_argument("--effort", type=float, choices=(-1.0, 0.0, 1.0), default=0.0,
                   help="of the compiler: 0 is what runs take; -1 ends sooner, with slower programs of about the size")
  new.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench/topologies.jsonl"),
                   help="gets a line of JSON for each program")
  return new


def compile_all(args: argparse.Namespace) -> None:
  """A line for each program of each topology and batch.

  Raises:
    ValueError: as `chips` does.
  """
  models = sizes.Models(sizes.SIZES[args.size](), args.dtype, fill=lambda model: model)
  log = logs.Log(None)
  about = {"size": args.size, "dtype": args.dtype, "effort": args.effort, "versions": versions()}
  for topology in args.topology:
    devices = chips(topology)
    for stage in args.stages:
      for batch in args.batch:
        for program in ahead.PROGRAMS[stage](sizes.Place(models.size, models, devices, batch)):
          if args.only and program.name not in args.only:
            continue
          line = compile_for(program, devices)
          log.say(said(f"{topology} {args.size} {stage}", line))
          run.append(args.out, {"topology": topology, "stage": stage, **about, **line, "load1": measure.load(),
                                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})


def versions() -> dict[str, str]:
  """Those of a run, and the compiler's."""
  try:
    return logs.versions() | {"libtpu": importlib.metadata.version("libtpu")}
  except importlib.metadata.PackageNotFoundError:
    return logs.versions()


def main(arguments: Sequence[str]) -> None:
  """Runs the command line."""
  args = parser().parse_args(arguments)
  jax.config.update("jax_platforms", "cpu")  # nothing runs, and a search for TPUs would wait for them
  jax.config.update("jax_exec_time_optimization_effort", args.effort)
  with cli.answer_in_one_line(f"finished lines are kept in {args.out}"):
    compile_all(args)


if __name__ == "__main__":
  main(sys.argv[1:])
