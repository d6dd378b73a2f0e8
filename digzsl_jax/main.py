"""Command line: `python -m digzsl_jax.main --config=configs/quickstart.py --workdir=DIR [--config.x.y=z]`."""

import functools
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from digzsl_jax import checkpoint, cli, logs, mesh, processes, stages
from digzsl_jax.bench import run as bench
from digzsl_jax.decoder_workspace import DecoderWorkspace
from digzsl_jax.runs import (
  cdm,
  class_tokens,
  classifier,
  clip_decoder,
  evaluate,
  evaluate_multilabel,
  evaluate_tags,
  generate,
  pretrain,
  quality,
  report,
  report_multilabel,
  report_tags,
  tag_masks,
  tagclip,
)
from digzsl_jax.tag_workspace import TagWorkspace
from digzsl_jax.workspace import Workspace

DIG_ZSL = {"cdm": cdm, "tokens": class_tokens, "generate": generate, "classifier": classifier, "quality": quality,
           "evaluate": evaluate, "report": report}
CLIP_DECODER = {"train": clip_decoder, "evaluate": evaluate_multilabel, "report": report_multilabel}
TAGCLIP = {"tags": tagclip, "masks": tag_masks, "evaluate": evaluate_tags, "report": report_tags}
STAGED = {"dig_zsl": (DIG_ZSL, Workspace), "clip_decoder": (CLIP_DECODER, DecoderWorkspace),
          "tagclip": (TAGCLIP, TagWorkspace)}
DIVIDED = {"dig_zsl", "clip_decoder"}  # what several processes can run together
# `(config, workdir, log, dry_run)` of each method.
METHODS = {name: functools.partial(stages.run, *parts) for name, parts in STAGED.items()} | {
    "pretrain": pretrain.run, "bench": bench.run}

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment; its fields are overridden by dots.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; default runs/<config name>.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, stages, parameters and compiled costs, and stop.")
flags.mark_flag_as_required("config")


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
  answer = functools.partial(cli.answer_in_one_line, f"finished stages are kept in {workdir}")
  with answer():
    processes.join()
  with processes.ending_together(), answer():
    log = logs.Log(workdir)
    together = f" of {processes.count()} processes" if processes.count() > 1 else ""
    log.say(f"{name} in {workdir} on {logs.devices(jax.devices())}{together}")
    if DRY_RUN.value and processes.is_first():
      print(CONFIG.value)
    if config["method"] not in METHODS:
      raise ValueError(f"config.method is {config['method']!r}; it must be one of {list(METHODS)}")
    if together and config["method"] not in DIVIDED:
      raise ValueError(f"config.method {config['method']!r} runs in one process, here are {processes.count()}; "
                       f"{processes.COUNT}=1 makes each one that knows of no other, of which to start one")
    checkpoint.check_method(workdir, config["method"])
    METHODS[config["method"]](config, workdir, log, DRY_RUN.value)


if __name__ == "__main__":
  app.run(main, flags_parser=read_flags)
