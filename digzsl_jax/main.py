"""Command line: `python -m digzsl_jax.main --config=configs/quickstart.py --workdir=DIR [--config.x.y=z]`."""

import functools
import itertools
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from digzsl_jax import checkpoint, cli, logs, mesh
from digzsl_jax.runs import cdm, class_tokens, classifier, evaluate, generate, pretrain, quality, report
from digzsl_jax.workspace import Workspace, parse

STAGES = {"cdm": cdm, "tokens": class_tokens, "generate": generate, "classifier": classifier, "quality": quality,
          "evaluate": evaluate, "report": report}
OF_IMAGES = {"tokens", "generate", "quality"}  # the stages that a data set of features does without
SHARED = {"method", "seed", "stages", "data", "models", "mesh"}

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment; its fields are overridden by dots.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; default runs/<config name>.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, stages, parameters and compiled costs, and stop.")
flags.mark_flag_as_required("config")


def dig_zsl(config: dict, workdir: pathlib.Path, log: logs.Log, dry_run: bool) -> None:
  """Runs the stages that `config["stages"]` names; one whose fingerprinted result is there is skipped.

  A stage's module has `NEEDS` (stages whose files it reads), `MODELS` (checkpoints), `Settings`, `run`, and
  where there is something to say: `validate` (finds impossible settings before anything is made), `complete`
  (whether its files are there), `lower` (its compiled steps).
  """
  if wrong := set(config) ^ (SHARED | set(STAGES)):
    raise ValueError(f"config has unknown or lacks sections {sorted(wrong)}; known are {sorted(SHARED | set(STAGES))}")
  asked = {name: STAGES[name] for name in checkpoint.choose(config["stages"], STAGES)}
  settings = {name: parse(module.Settings, config[name], name) for name, module in STAGES.items()}
  ws = Workspace(config, workdir, log)
  if not ws.dataset.has_images and (wrong := sorted(OF_IMAGES & set(asked))):
    raise ValueError(f"config.stages: {wrong} make or compare images, but the data set has features in place of "
                     f"images; choose among {[name for name in STAGES if name not in OF_IMAGES]}")
  ws.check_models(itertools.chain(*(module.MODELS for module in asked.values())))
  needs = {name: module.NEEDS if ws.dataset.has_images else tuple(n for n in module.NEEDS if n not in OF_IMAGES)
           for name, module in STAGES.items()}
  stages = {name: ws.stage(name, needs[name], module.MODELS) for name, module in STAGES.items()}
  for name, module in asked.items():
    try:
      getattr(module, "validate", lambda *_: None)(settings[name], ws)
    except ValueError as error:
      raise ValueError(f"config.{name}: {error}") from error
  if dry_run:
    print_costs(asked, settings, ws)
    return
  checkpoint.claim(stages, needs, asked)
  logs.write_provenance(workdir, config)
  for name, module in asked.items():
    if stages[name].done and getattr(module, "complete", lambda *_: True)(ws, stages[name].folder):
      log.say(f"{name}: already there")
      continue
    stages[name].make(functools.partial(module.run, settings[name], ws, stages[name].folder))
    log.say(f"{name}: {stages[name].results()['seconds']} s")


def print_costs(asked: dict, settings: dict, ws: Workspace) -> None:
  """Parameters, and what each compiled step takes."""
  print(logs.parameter_table(ws.modules))
  print("Costs are XLA's own count, in which the body of a loop counts once.")
  for name, module in asked.items():
    print(f"stage {name}")
    for step, lowered in getattr(module, "lower", lambda *_: {})(settings[name], ws).items():
      print(f"  {step}: {logs.memory_and_flops(lowered.compile())}")


METHODS = {"dig_zsl": dig_zsl, "pretrain": pretrain.run}


def read_flags(arguments: list[str]) -> list[str]:
  """Parses the command line; a wrong setting or config file is answered by one line."""
  try:
    rest = app.parse_flags_with_usage(arguments)
    CONFIG.value.to_dict()  # a file that could not be loaded is reported only when it is used
    return rest
  except (AttributeError, KeyError, OSError) as error:
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps its KeyErrors
      error = error.args[0]
    what = "" if isinstance(error, OSError) else "the config has no field "
    sys.exit(f"error: {what}" + " ".join(str(error.args[0] if error.args else error).split()))


def main(arguments: list[str]) -> None:
  """Runs the method that the config names; a user's mistake ends it with a message, not a traceback."""
  if arguments[1:]:
    sys.exit(f"error: {arguments[1:]} not understood; settings are written --config.section.field=value")
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  workdir = pathlib.Path(WORKDIR.value or f"runs/{name}").expanduser()
  config = CONFIG.value.to_dict()
  # `--config.stages=cdm,tokens` arrives as a tuple of one string.
  config["stages"] = tuple(name for entry in config["stages"] for name in entry.split(","))
  mesh.divide_cpu()
  cli.start()
  with cli.answer_in_one_line(f"finished stages are kept in {workdir}"):
    log = logs.Log(workdir)
    log.say(f"{name} in {workdir} on {logs.devices(jax.devices())}")
    if DRY_RUN.value:
      print(CONFIG.value)
    if config["method"] not in METHODS:
      raise ValueError(f"config.method is {config['method']!r}; it must be one of {list(METHODS)}")
    checkpoint.check_method(workdir, config["method"])
    METHODS[config["method"]](config, workdir, log, DRY_RUN.value)


if __name__ == "__main__":
  app.run(main, flags_parser=read_flags)
