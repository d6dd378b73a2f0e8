"""Runs a config once for every combination of settings, one workdir each; prints first, runs on request.

Look:  python launch/sweep.py --config=configs/quickstart.py --set seed=0,1,2 --set tokens.gradient=x0,last
Run:   the same with --run; what has finished is skipped, so it may be interrupted and started again
Table: the same with --table, at any time; mean ± sample standard deviation over seeds

A value holds no comma: each comma starts another one. Workdirs are named by their settings, so a sweep
that is widened keeps what was run.
"""

import argparse
import itertools
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

AVERAGED = "seed"
COLUMNS = {  # title: path in results.json
    "T1": "czsl.T1",
    "H": "gzsl.H",
    "plain SD T1": "baselines.plain_sd.czsl.T1",
    "plain SD H": "baselines.plain_sd.gzsl.H",
    "CDM agr.": "generated.cdm_agreement",
    "plain SD CDM agr.": "generated.plain_sd_cdm_agreement",
    "judge agr.": "generated.judge_agreement",
    "plain SD judge agr.": "generated.plain_sd_judge_agreement",
    "judge pair agr.": "generated.judge_pair_agreement",
    "plain SD judge pair agr.": "generated.plain_sd_judge_pair_agreement",
    "residual CDM prototype T1": "baselines.cdm_prototype_residual.czsl.T1",
    "residual CDM prototype H": "baselines.cdm_prototype_residual.gzsl.H",
    "MLP CDM prototype T1": "baselines.cdm_prototype_mlp.czsl.T1",
    "MLP CDM prototype H": "baselines.cdm_prototype_mlp.gzsl.H",
    "CLIP zero-shot T1": "baselines.clip_zero_shot.czsl.T1",
    "CLIP zero-shot H": "baselines.clip_zero_shot.gzsl.H",
    "real images T1": "baselines.real_images.czsl.T1",
    "real images H": "baselines.real_images.gzsl.H",
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


def workdir(out: pathlib.Path, chosen: Mapping[str, str]) -> pathlib.Path:
  """The folder of a combination, named by its settings."""
  name = ",".join(f"{field}={value}" for field, value in chosen.items()) or "default"
  return out / name.replace("/", "_").replace(" ", "")


def command(config: str, folder: pathlib.Path, chosen: Mapping[str, str]) -> list[str]:
  """The command line that runs a combination."""
  return [sys.executable, "-m", "digzsl_jax.main", f"--config={config}", f"--workdir={folder}",
          *(f"--config.{field}={value}" for field, value in chosen.items())]


def entry(results: Mapping, path: str) -> float | None:
  """The number at a dotted path, None where the run has none."""
  for name in path.split("."):
    results = results.get(name) if isinstance(results, Mapping) else None
  return results


def spread(numbers: Sequence[float]) -> str:
  """Mean ± sample standard deviation, to one decimal; the mean of a single number, a dash for none."""
  if not numbers:
    return "–"
  mean = f"{statistics.fmean(numbers):.1f}"
  return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.1f}"


def table(runs: Iterable[tuple[Mapping[str, str], pathlib.Path]]) -> str:
  """Markdown: a row for each combination but for the seed, columns that no run has left out."""
  groups = {}
  for chosen, folder in runs:
    row = tuple((field, value) for field, value in chosen.items() if field != AVERAGED)
    found = groups.setdefault(row, [])
    if (file := folder / "results.json").is_file():
      found.append(json.loads(file.read_text(encoding="utf-8")))
  columns = {title: path for title, path in COLUMNS.items()
             if any(entry(results, path) is not None for found in groups.values() for results in found)}
  lines = [["settings", "runs", *columns], ["---"] * (2 + len(columns))]
  for row, found in groups.items():
    numbers = [[entry(results, path) for results in found] for path in columns.values()]
    lines.append([", ".join(f"{field}={value}" for field, value in row) or "as configured", str(len(found)),
                  *(spread([number for number in column if number is not None]) for column in numbers)])
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints command lines, runs them or prints the table, as asked; 1 if a run failed."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="a file of configs/")
  parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE,...", dest="settings")
  parser.add_argument("--out", type=pathlib.Path, help="of workdirs; default runs/sweep_<config name>")
  parser.add_argument("--run", action="store_true", help="run the command lines, then print the table")
  parser.add_argument("--table", action="store_true", help="print the table of what has finished")
  options = parser.parse_args(arguments)
  try:
    out = options.out or pathlib.Path("runs") / f"sweep_{pathlib.Path(options.config).stem}"
    runs = [(chosen, workdir(out, chosen)) for chosen in combinations(options.settings)]
  except ValueError as error:
    parser.error(str(error))
  failed = []
  for chosen, folder in runs if options.run or not options.table else ():
    line = command(options.config, folder, chosen)
    print(shlex.join(line), flush=True)
    if options.run and subprocess.run(line, check=False).returncode:
      failed.append(folder)  # the other combinations are still wanted
  if options.run or options.table:
    print(table([run for run in runs if run[1] not in failed]))  # its results, if any, are of another attempt
  if failed:
    print(f"failed: {', '.join(map(str, failed))}", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
