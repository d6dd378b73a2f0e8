"""Runs a config once for every combination of settings, one workdir each; prints first, runs on request.

Look:  python launch/sweep.py --config=configs/quickstart.py --set seed=0,1,2 --set tokens.gradient=x0,last
Study: the same with --study gamma, or any other of `STUDIES`: one factor at a time, around the config and --set
Run:   the same with --run; what has finished is skipped, so it may be interrupted and started again
Table: the same with --table, at any time; `python -m digzsl_jax.report`, which prints it, also writes a page

A value holds no comma: each comma starts another one. Workdirs are named by their settings, so a sweep
that is widened keeps what was run. Runs share no stages: each folder is whole, and what takes long before the
tokens, the features of photographs, is kept in `cdm.cache` for all of them.
"""

import argparse
import itertools
import os
import pathlib
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

# Ablations and sensitivities by `config.method`, each a list of settings as --set takes them.
STUDIES = {
    # arXiv 2412.17219. Three more are in every run: without tokens (plain Stable Diffusion), N_gen (`images_curve`),
    # lambda (`lambda_curve`).
    "dig_zsl": {
        "guide": ["tokens.guide=cdm,clip"],  # without the CDM
        "gradient": ["tokens.gradient=x0,last", "tokens.steps=10"],
        "grad_calls": ["tokens.gradient=last", "tokens.steps=10", "tokens.grad_calls=1,2,4",
                       "tokens.stop_unconditional=False"],  # True would drop what comes through the latent
        "temperature": ["tokens.temperature=0.02,0.05,0.1,0.2,1.0"],  # 1.0: the paper shows none
        "gamma": ["tokens.stop_accuracy=0.3,0.5,0.9,1.0"],
        "noise": ["tokens.noise_period=0,1,5"],  # fixed, fresh for every update, for every fifth
        "images": ["tokens.images=1,2,4,8"],
        "seeds": ["seed=0,1,2"],
    },
    # arXiv 2406.14830. Two more are in every run: CLIP alone, and the last weights in place of their average.
    "clip_decoder": {
        # 0.0: without the CLIP loss. train.beta is no study: Adam heeds alpha / beta alone (but for `coupled` decay),
        # and beta=0.0 leaves the decoder untrained, since the CLIP loss does not pass through it.
        "alpha": ["train.alpha=0.0,0.1,1.0,10.0"],
        "template": ["models.template={name},a photo of a {name},imagenet80"],  # no prompt, one, the mean of 80
        "queries": ["models.queries=text,random"],  # vectors of words are a file of yours: --set models.queries=FILE
        "groups": ["train.groups=0,10,100"],  # above 0, a decoder of the seen labels alone: what does openness cost?
        "encoder": ["train.train_encoder=False,True"],  # False wants trained weights: CLIP's, or models.tresnet
        "seeds": ["seed=0,1,2"],
    },
    # arXiv 2312.12828. Its own ablation is in every run: whole pictures, patches, + DMAR, + CWR. Nothing in it is
    # random but scenes: --set data.seed=0,1,2.
    "tagclip": {
        "threshold": ["tags.threshold=0.1,0.3,0.5,0.7"],
        "votes": ["tags.votes=1,2,3,4"],
        "first_layer": ["tags.first_layer=0,1,2,3,4"],
        "compat": ["tags.compat=False,True"],
        "template": ["models.template={name},a photo of a {name},imagenet80"],
    },
}


def combinations(settings: Iterable[str]) -> list[dict[str, str]]:
  """The cartesian product of `field=value,value,...`, the last field changing fastest.

  Raises:
    ValueError: a setting without field or values, or a field or value given twice.
  """
  values_of = {}
  for setting in settings:
    field, _, text = setting.partition("=")
    field, values = field.removeprefix("config."), text.split(",")
    if not field or not all(values):
      raise ValueError(f"--set {setting}: write field=value or field=value,value")
    if field in values_of or len(set(values)) < len(values):
      raise ValueError(f"--set {setting}: a field or value is given twice")
    values_of[field] = values
  return [dict(zip(values_of, chosen)) for chosen in itertools.product(*values_of.values())]


def named_studies(names: Sequence[str], method: str | None) -> list[list[str]]:
  """The settings of these studies of a method; "all" names every one.

  Raises:
    ValueError: the method has no such study.
  """
  known = STUDIES.get(method, {})
  if wrong := [name for name in names if name not in known and not (known and name == "all")]:
    raise ValueError(f"--study {wrong[0]}: configs of method {method} have the studies {[*known]}")
  return [known[name] for name in (known if "all" in names else names)]


def studied(chosen: Mapping[str, str], studies: Iterable[Sequence[str]],
            defaults: Mapping[str, str]) -> list[dict[str, str]]:
  """`chosen` and, for every study, what is to be run beside it: settings that change something, each once.

  Args:
    defaults: value of every field of the config.
  """
  base = {**defaults, **chosen}
  found = [dict(chosen)]
  for study in studies:
    for setting in combinations(study):
      run = {**chosen, **{field: value for field, value in setting.items() if value != base.get(field)}}
      if run not in found:
        found.append(run)
  return found


def config_values(config: str) -> dict[str, str]:
  """Every field of a config file by its dotted name, as it is written in a setting."""
  def flat(section, prefix=""):
    for name, value in section.items():
      yield from flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, str(value))]

  sys.path.insert(0, os.getcwd())  # as for the command lines: config files import `configs.base`
  return dict(flat(runpy.run_path(config)["get_config"]().to_dict()))


def workdir(out: pathlib.Path, chosen: Mapping[str, str]) -> pathlib.Path:
  """The folder of a combination, named by its settings."""
  name = ",".join(f"{field}={value}" for field, value in chosen.items()) or "default"
  return out / name.replace("/", "_").replace(" ", "")


def command(config: str, folder: pathlib.Path, chosen: Mapping[str, str]) -> list[str]:
  """The command line that runs a combination."""
  return [sys.executable, "-m", "digzsl_jax.main", f"--config={config}", f"--workdir={folder}",
          *(f"--config.{field}={value}" for field, value in chosen.items())]


def tabulate(out: pathlib.Path, folders: Iterable[pathlib.Path]) -> int:
  """Prints the table of the runs in `folders` and writes their page; the exit status."""
  line = [sys.executable, "-m", "digzsl_jax.report", f"--out={out / 'merged_report.html'}", *map(str, folders)]
  return subprocess.run(line, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints command lines, runs them or prints the table, as asked; not 0 if a run failed or is not there."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="a file of configs/")
  parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE,...", dest="settings")
  parser.add_argument("--study", action="append", default=[], metavar="NAME", dest="studies",
                      help="a study of the config's method, or all of them")
  parser.add_argument("--out", type=pathlib.Path, help="of workdirs; default runs/sweep_<config name>")
  parser.add_argument("--run", action="store_true", help="run the command lines, then print the table")
  parser.add_argument("--table", action="store_true", help="print the table of what has finished")
  options = parser.parse_args(arguments)
  out = options.out or pathlib.Path("runs") / f"sweep_{pathlib.Path(options.config).stem}"
  try:
    chosen = combinations(options.settings)
    if options.studies:
      defaults = config_values(options.config)
      studies = named_studies(options.studies, defaults.get("method"))
      chosen = [run for one in chosen for run in studied(one, studies, defaults)]
  except (ValueError, OSError) as error:
    parser.error(str(error))
  runs = {workdir(out, one): one for one in chosen}  # study "seeds" may ask for what --set does
  failed = []
  for folder, one in runs.items() if options.run or not options.table else ():
    line = command(options.config, folder, one)
    print(shlex.join(line), flush=True)
    if options.run and subprocess.run(line, check=False).returncode:
      failed.append(folder)  # the other combinations are still wanted
  # What is in the folder of a failed run, if anything, is of another attempt.
  status = tabulate(out, [folder for folder in runs if folder not in failed]) if options.run or options.table else 0
  if failed:
    print(f"failed: {', '.join(map(str, failed))}", file=sys.stderr)
  return 1 if failed else status


if __name__ == "__main__":
  sys.exit(main())
