"""Command line without `ml_collections`: `python -m digzsl_jax.bench --stages tokens generate --sizes tiny`."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax

from digzsl_jax import cli, logs, mesh
from digzsl_jax.bench import run, steps


def parser() -> argparse.ArgumentParser:
  """A flag for every field of `run.Settings`, whose defaults are those of `configs/bench.py`."""
  new = argparse.ArgumentParser(prog="python -m digzsl_jax.bench", description="Times production's compiled steps.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  new.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/bench"), help="gets bench.jsonl")
  new.add_argument("--dry_run", action="store_true", help="print what a call costs, and stop")
  new.add_argument("--stages", nargs="+", choices=list(steps.BENCHES), default=list(steps.BENCHES), help="benches")
  new.add_argument("--devices", type=cli.at_least(0), default=0, help="how many, 0 for all")
  for field in dataclasses.fields(run.Settings):
    switch = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {
        "type": str if isinstance(field.default, tuple) else type(field.default)}
    more = {"nargs": "+"} if isinstance(field.default, tuple) else {}
    new.add_argument(f"--{field.name}", default=field.default, help="see run.Settings", **switch, **more)
  return new


def main(arguments: Sequence[str]) -> None:
  """Runs the command line."""
  given = vars(parser().parse_args(arguments))
  workdir, dry_run, stages, devices = (given.pop(name) for name in ("workdir", "dry_run", "stages", "devices"))
  mesh.divide_cpu()
  cli.start()
  with cli.answer_in_one_line(f"finished lines are kept in {workdir}"):
    log = logs.Log(workdir)
    log.say(f"bench in {workdir} on {logs.devices(jax.devices())}")
    given["sizes"] = tuple(given["sizes"])
    run.run({"method": "bench", "stages": stages, "mesh": {"devices": devices}, "bench": given}, workdir, log, dry_run)


if __name__ == "__main__":
  main(sys.argv[1:])
