"""What finished runs measured, grouped by their settings: mean and spread over seeds.

A run is a working directory with `config.json` and `results.json`, which the stage evaluate of its method wrote. Runs
whose configs differ in nothing but the seed, and what no result depends on, are one group.
"""

import collections
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from digzsl_jax import files
from digzsl_jax import report_page as page

NOT_COMPARED = ("seed", "stages", "mesh", "report", "cdm.cache", "models.cache")  # fields and sections
DIG_ZSL = {  # title: {column: path in results.json}
    "Accuracy": {
        "T1": "czsl.T1",
        "H": "gzsl.H",
        "oracle H": "gzsl_oracle.H",
        "plain SD T1": "baselines.plain_sd.czsl.T1",
        "plain SD H": "baselines.plain_sd.gzsl.H",
        "plain SD oracle H": "baselines.plain_sd.gzsl_oracle.H",
    },
    "Generated images": {
        "CDM agr.": "generated.cdm_agreement",
        "plain SD CDM agr.": "generated.plain_sd_cdm_agreement",
        "judge agr.": "generated.judge_agreement",
        "plain SD judge agr.": "generated.plain_sd_judge_agreement",
        "judge pair agr.": "generated.judge_pair_agreement",
        "plain SD judge pair agr.": "generated.plain_sd_judge_pair_agreement",
    },
    "Quality of generated images": {
        "CMMD": "quality.learned.cmmd",
        "plain SD CMMD": "quality.plain.cmmd",
        "FID": "quality.learned.fid",
        "plain SD FID": "quality.plain.fid",
    },
    "Without generated images, and the bound": {
        "residual CDM prototype T1": "baselines.cdm_prototype_residual.czsl.T1",
        "residual CDM prototype H": "baselines.cdm_prototype_residual.gzsl.H",
        "MLP CDM prototype T1": "baselines.cdm_prototype_mlp.czsl.T1",
        "MLP CDM prototype H": "baselines.cdm_prototype_mlp.gzsl.H",
        "CLIP zero-shot T1": "baselines.clip_zero_shot.czsl.T1",
        "CLIP zero-shot H": "baselines.clip_zero_shot.gzsl.H",
        "Gaussian features T1": "baselines.gaussian_features.czsl.T1",
        "Gaussian features H": "baselines.gaussian_features.gzsl.H",
        "real images T1": "baselines.real_images.czsl.T1",
        "real images H": "baselines.real_images.gzsl.H",
    },
}
LISTS = {"zsl": "ZSL", "gzsl": "GZSL", "seen": "seen"}
CLIP_DECODER = {
    "Mean average precision": {
        **{f"{name} mAP": f"{part}.mAP" for part, name in LISTS.items()},
        **{f"CLIP {name} mAP": f"baselines.clip_zero_shot.{part}.mAP" for part, name in LISTS.items()},
    },
    "Best labels of each image": {f"{name} F1@{top}": f"{part}.F1@{top}"
                                  for part, name in LISTS.items() for top in (3, 5)},
    "The last weights in place of their average, and chance": {
        **{f"last {name} mAP": f"baselines.last_weights.{part}.mAP" for part, name in LISTS.items()},
        **{f"random {name} mAP": f"baselines.random_scores.{part}.mAP" for part, name in LISTS.items()},
    },
}
STEPS = {"baselines.global.": "CLIP ", "baselines.patch.": "patches ", "baselines.dmar.": "+ DMAR ", "": ""}
TAGCLIP = {
    "Mean average precision": {f"{name}mAP": f"{path}mAP" for path, name in STEPS.items()},
    "Tags": {f"{name}F1": f"{path}F1" for path, name in STEPS.items()},
    "Masks": {"mIoU": "mIoU", "best tag everywhere mIoU": "masks.best_tag.mIoU",
              "all background mIoU": "masks.all_background.mIoU"},
}
PARTS = {"dig_zsl": DIG_ZSL, "clip_decoder": CLIP_DECODER, "tagclip": TAGCLIP}  # by `config.method`
ALWAYS = {"dig_zsl": "czsl.T1", "clip_decoder": "seen.mAP", "tagclip": "mAP"}  # what every run of a method has measured
NAMES = {"dig_zsl": "DIG-ZSL", "gaussian_features": "Gaussian features", "clip_decoder": "CLIP-Decoder",
         "tagclip": "TagCLIP"}


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    folder: its working directory.
    method: of its config, a key of `PARTS`.
    seed: of its config.
    fields: the other fields of its config, by dotted name; `method` is the one that heads its results.
    results: what stage evaluate measured.
  """

  folder: pathlib.Path
  method: str
  seed: int
  fields: dict[str, Any]
  results: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in their seeds alone.

  Attributes:
    label: the settings in which they differ from most other groups of their table.
    fields: as of each run.
  """

  label: str
  fields: dict[str, Any]
  runs: list[Run]


def flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
  """The fields of a config by dotted name."""
  return {key: leaf for name, value in config.items() for key, leaf in (
      flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}).items()}


def entry(results: Any, path: str) -> Any:
  """What stands at a dotted path, None where the run has nothing."""
  for name in path.split("."):
    results = results.get(name) if isinstance(results, Mapping) else None
  return results


def numbers(runs: Iterable[Run], path: str) -> list[float]:
  """The numbers at a dotted path, of the runs that have one."""
  return [value for run in runs if page.known(value := entry(run.results, path))]


def find(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The working directories at or below `folder`; none lies in another."""
  if any((folder / name).is_file() for name in ("versions.json", "results.json")):
    yield folder
  elif folder.is_dir():
    for below in sorted(folder.iterdir()):
      yield from find(below)


def read(folder: pathlib.Path) -> Run | None:
  """A run from its working directory; None for one of a method without a table, such as pretraining.

  Raises:
    ValueError: it has not finished, or a file is damaged or lacks what every run has.
  """
  config, results = (files.read_json(path) if (path := folder / name).is_file() else None
                     for name in ("config.json", "results.json"))
  method = entry(config, "method") or "dig_zsl"
  if method not in PARTS:
    return None
  if results is None:
    raise ValueError(f"{folder} has no results.json: the run has not finished; give its command again")
  if config is None:
    raise ValueError(f"{folder} has no config.json, so its settings are not known")
  for name, found, field, good in (("config", config, "seed", page.known),
                                   ("results", results, ALWAYS[method], page.known),
                                   ("results", results, "dataset", lambda value: isinstance(value, str))):
    if not good(value := entry(found, field)):
      raise ValueError(f"{folder}/{name}.json: {field} is {value!r}, so it is damaged or of another version; "
                       "run it again in another folder")
  fields = {name: value for name, value in flat(config).items()
            if name not in NOT_COMPARED and name.partition(".")[0] not in NOT_COMPARED}
  return Run(folder, method, config["seed"], fields | {"method": results.get("method", method)}, results)


def collect(folders: Iterable[pathlib.Path]) -> tuple[list[Run], list[str]]:
  """The runs at or below `folders`, and why others were left out."""
  runs, problems, seen = {}, [], set()
  for folder in folders:
    found = list(find(folder))
    if not found:
      problems.append(f"there is no run in {folder}")
    for path in found:
      if path.resolve() in seen:
        continue
      seen.add(path.resolve())
      try:
        run = read(path)
      except (ValueError, OSError) as error:
        problems.append(str(error))
        continue
      if run is not None:
        first = runs.setdefault((run.results["dataset"], json.dumps([run.seed, run.fields], sort_keys=True)), run)
        if first is not run:
          problems.append(f"{path} has config and seed of {first.folder}, and counts once")
  return list(runs.values()), problems


def short_names(fields: Iterable[str]) -> dict[str, str]:
  """The last words of each dotted name, as many as tell it from the others."""
  fields = list(fields)
  endings = collections.Counter(ending for field in fields for ending in endings_of(field))
  return {field: next((end for end in endings_of(field) if endings[end] == 1), field) for field in fields}


def endings_of(field: str) -> list[str]:
  """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
  words = field.split(".")
  return [".".join(words[-count:]) for count in range(1, len(words) + 1)]


def group(runs: Iterable[Run]) -> list[tuple[list[Group], dict[str, Any]]]:
  """By method and data set: runs put together by their settings, and what the labels leave out, by short name.

  A label leaves out a value that more than half of the groups share.
  """
  found: dict[tuple[str, str], dict[str, list[Run]]] = {}
  for run in runs:
    comparable = found.setdefault((run.method, run.results["dataset"]), {})
    comparable.setdefault(json.dumps(run.fields, sort_keys=True), []).append(run)
  grouped = []
  for comparable in found.values():
    settings = [alike[0].fields for alike in comparable.values()]
    labels, usual = labelled(settings)
    grouped.append((list(map(Group, labels, settings, comparable.values())), usual))
  return grouped


def title(groups: Sequence[Group]) -> str:
  """What heads a table: methods and data set."""
  methods = dict.fromkeys(NAMES.get(name := one.fields["method"], name) for one in groups)
  return f"{' and '.join(methods)} on {groups[0].runs[0].results['dataset']}"


def labelled(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
  """What tells settings from each other, one label for each, and the values that are left out of them."""
  labels, usual = [{} for _ in settings], {}
  for field, name in short_names(dict.fromkeys(name for fields in settings for name in fields)).items():
    values = [fields.get(field) for fields in settings]
    keys = [json.dumps(value) for value in values]
    most, count = collections.Counter(keys).most_common(1)[0]
    if len(keys) / 2 < count < len(keys):
      usual[name] = json.loads(most)
    for label, key, value in zip(labels, keys, values):
      if count < len(keys) and not (name in usual and key == most):
        label[name] = value
  return [stated(label) or "as configured" for label in labels], usual


def remarks(groups: Sequence[Group], usual: Mapping[str, Any]) -> list[str]:
  """What a reader of a table has to know beside it."""
  said = [f"Where a row does not say otherwise: {stated(usual)}."] if usual else []
  if len({frozenset(run.seed for run in one.runs) for one in groups}) > 1:
    said.append("Rows are of different seeds, so part of what differs between them is chance: see each run.")
  warnings = (entry(run.results, "warnings") or [] for one in groups for run in one.runs)
  return said + list(dict.fromkeys(str(warning) for of_run in warnings for warning in of_run))


def stated(settings: Mapping[str, Any]) -> str:
  return ", ".join(f"{name}={value}" for name, value in settings.items())


def spread(values: Sequence[float], digits: int = 1) -> str:
  """Mean ± sample standard deviation; the mean of a single number, a dash for none."""
  if not values:
    return "\u2013"
  mean = f"{statistics.fmean(values):.{digits}f}"
  return mean if len(values) < 2 else f"{mean} \u00b1 {statistics.stdev(values):.{digits}f}"


def cells(runs: Sequence[Run], columns: Mapping[str, str]) -> list[str]:
  """A cell for each column; all are of the size of percentages but CMMD, which is smaller."""
  return [spread(numbers(runs, path), 2 if path.endswith("cmmd") else 1) for path in columns.values()]


def measured(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
  """`PARTS` of runs of one method, without the columns for which none has a number."""
  parts = {title: {name: path for name, path in columns.items() if numbers(runs, path)}
           for title, columns in PARTS[runs[0].method].items()}
  return {title: columns for title, columns in parts.items() if columns}


def markdown(groups: Sequence[Group]) -> str:
  """The table of one method and data set: a row for each group, columns that no run has left out."""
  columns = {}
  for part in measured([run for one in groups for run in one.runs]).values():
    columns |= part
  rows = [["settings", "runs", *columns], ["---"] * (2 + len(columns))]
  rows += [[one.label.replace("|", "\\|"), str(len(one.runs)), *cells(one.runs, columns)] for one in groups]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)
