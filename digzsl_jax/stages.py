"""Runs a method's stages one after another; one whose fingerprinted result is there is skipped.

A stage is a module with `NEEDS` (stages whose files it reads), `MODELS` (checkpoints), `Settings`, `run`, and where
there is something to say: `validate` (finds impossible settings before anything is made), `complete` (whether its
files are there), `lower` (its compiled steps).

Several processes run a stage together: each calls its `run` and does its part of what is divided; what one of them can
do alone, and all that is written but images, is left to the first. The others go on when they see its files.
"""

import functools
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from digzsl_jax import checkpoint, logs, processes
from digzsl_jax.base_workspace import BaseWorkspace, parse

SHARED = {"method", "seed", "stages", "data", "models", "mesh"}  # sections of every method's config


def run(known: Mapping[str, ModuleType], workspace: type[BaseWorkspace], config: Mapping[str, Any],
        workdir: pathlib.Path, log: logs.Log, dry_run: bool) -> None:
  """Runs what `config["stages"]` names of the `known` stages, in their order.

  Raises:
    ValueError: a section, stage or setting is unknown, missing or impossible; nothing was made then.
  """
  if wrong := set(config) ^ (SHARED | set(known)):
    raise ValueError(f"config has unknown or lacks sections {sorted(wrong)}; known are {sorted(SHARED | set(known))}")
  asked = {name: known[name] for name in checkpoint.choose(config["stages"], known)}
  settings = {name: parse(module.Settings, config[name], name) for name, module in known.items()}
  ws = workspace(config, workdir, log)
  ws.admit(asked)
  needs = {name: ws.needs(module) for name, module in known.items()}
  stages = {name: ws.stage(name, needs[name], module.MODELS) for name, module in known.items()}
  for name, module in asked.items():
    try:
      getattr(module, "validate", lambda *_: None)(settings[name], ws)
    except ValueError as error:
      raise ValueError(f"config.{name}: {error}") from error
  if dry_run:
    print_costs(asked, settings, ws)
    return
  processes.check_shared(workdir)
  checkpoint.claim(stages, needs, asked)
  logs.write_provenance(workdir, config)
  for name, module in asked.items():
    complete = functools.partial(getattr(module, "complete", lambda *_: True), ws, stages[name].folder)
    if processes.told(lambda done=stages[name], complete=complete: done.done and complete()):
      log.say(f"{name}: already there")
      continue
    stages[name].make(functools.partial(module.run, settings[name], ws, stages[name].folder))
    log.say(f"{name}: {stages[name].results()['seconds']} s")


def print_costs(asked: Mapping[str, ModuleType], settings: Mapping[str, Any], ws: BaseWorkspace) -> None:
  """Parameters, and what each compiled step takes."""
  say = print if processes.is_first() else lambda text: None
  say(logs.parameter_table(ws.modules))
  say("Costs are XLA's own count, in which the body of a loop counts once.")
  for name, module in asked.items():
    say(f"stage {name}")
    for step, lowered in getattr(module, "lower", lambda *_: {})(settings[name], ws).items():
      say(f"  {step}: {logs.memory_and_flops(lowered.compile())}")
