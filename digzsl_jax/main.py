"""Command line: `python -m digzsl_jax.main --config=configs/quickstart.py --workdir=DIR [--config.x.y=z]`."""

import os
import pathlib
import sys
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from digzsl_jax import checkpoint, logs
from digzsl_jax.runs import cdm, class_tokens, classifier, evaluate, generate, pretrain, report
from digzsl_jax.workspace import Workspace, parse

STAGES = {"cdm": cdm, "tokens": class_tokens, "generate": generate, "classifier": classifier, "evaluate": evaluate,
          "report": report}
SHARED = {"method", "seed", "stages", "data", "models", "mesh"}

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment; its fields are overridden by dots.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; default runs/<config name>.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, stages, parameters and compiled costs, and stop.")
flags.mark_flag_as_required("config")


def dig_zsl(config: dict, workdir: pathlib.Path, log: logs.Log, dry_run: bool) -> None:
  """Runs the stages that `config["stages"]` names; one whose fingerprinted result is there is skipped."""
  if unknown := set(config) - SHARED - set(STAGES):
    raise ValueError(f"config has unknown sections {sorted(unknown)}; known are {sorted(SHARED | set(STAGES))}")
  if unknown := set(config["stages"]) - set(STAGES):
    raise ValueError(f"config.stages: {sorted(unknown)} unknown; choose among {list(STAGES)}")
  settings = {name: parse(module.Settings, config[name], name) for name, module in STAGES.items()}
  ws = Workspace(config, workdir, log)
  if dry_run:
    print(logs.parameter_table(ws.modules))
    print("Costs are XLA's own count, in which the body of a loop counts once.")
  for name, module in STAGES.items():
    stage = ws.stage(name, module.NEEDS)
    if dry_run:
      print(f"stage {name}: {'run' if name in config['stages'] else 'not asked for'}")
      for step, lowered in getattr(module, "lower", lambda *_: {})(settings[name], ws).items():
        print(f"  {step}: {logs.memory_and_flops(lowered.compile())}")
    elif name in config["stages"]:
      run_stage(name, module, settings[name], ws, stage)


def run_stage(name: str, module, settings, ws: Workspace, stage: checkpoint.Stage) -> None:
  if stage.finished():
    ws.log.say(f"{name}: already there")
    return
  start = time.monotonic()
  results = module.run(settings, ws, stage.folder)
  stage.finish(dict(results or {}, seconds=round(time.monotonic() - start, 1)))
  ws.log.say(f"{name}: {time.monotonic() - start:.1f} s")


def main(_) -> None:
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  workdir = pathlib.Path(WORKDIR.value or f"runs/{name}").expanduser()
  config = CONFIG.value.to_dict()
  # `--config.stages=cdm,tokens` arrives as a tuple of one string.
  config["stages"] = tuple(name for entry in config["stages"] for name in entry.split(","))
  if not jax.config.jax_compilation_cache_dir:  # a second run starts warm
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/digzsl_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  log = logs.Log(workdir)
  log.say(f"{name} in {workdir} on {logs.devices()}")
  try:
    if DRY_RUN.value:
      print(CONFIG.value)
    else:
      checkpoint.write_json(workdir / "config.json", config)
      checkpoint.write_json(workdir / "versions.json", logs.versions())
    {"dig_zsl": dig_zsl, "pretrain": pretrain.run}[config["method"]](config, workdir, log, DRY_RUN.value)
  except (ValueError, OSError) as error:
    if os.environ.get("DIGZSL_TRACEBACK"):
      raise
    sys.exit(f"error: {error}\n(set DIGZSL_TRACEBACK=1 for the traceback; finished stages are kept in {workdir})")


if __name__ == "__main__":
  app.run(main)
