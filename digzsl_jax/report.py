"""Finished runs -> one table with mean and spread, and a page with the curves: `python -m digzsl_jax.report DIR...`

Every run of DIG-ZSL or CLIP-Decoder at or below a DIR is read. Runs that differ in nothing but their seeds are one
row; runs of different methods or data sets stand in different tables. What cannot be read, has not finished or repeats
another run is named on standard error and left out, and the exit status is 1.

`--bench FILE...` prints the table of `bench.jsonl` files instead, for which nothing is written.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from digzsl_jax import files, merged_runs
from digzsl_jax import report_page as page
from digzsl_jax.bench import table as bench_table
from digzsl_jax.merged_runs import Group, Run, numbers
from digzsl_jax.report_page import Html, tag

SOURCES = {"learned": "DIG-ZSL, learnt tokens", "plain": "plain Stable Diffusion, same noise"}
LINES = {  # of the sensitivity, by method, (CSS class, name): path in results.json
    "dig_zsl": {
        ("learned", "T1"): "czsl.T1",
        ("h", "H"): "gzsl.H",
        ("plain", "T1, plain Stable Diffusion"): "baselines.plain_sd.czsl.T1",
        ("other", "H, plain Stable Diffusion"): "baselines.plain_sd.gzsl.H"},
    "clip_decoder": {
        ("learned", "ZSL mAP"): "zsl.mAP",
        ("h", "GZSL mAP"): "gzsl.mAP",
        ("s", "seen mAP"): "seen.mAP",
        ("plain", "ZSL mAP, CLIP alone"): "baselines.clip_zero_shot.zsl.mAP"},
    "tagclip": {
        ("learned", "mAP"): "mAP",
        ("h", "F1"): "F1",
        ("s", "mIoU"): "mIoU",
        ("plain", "mAP, whole pictures"): "baselines.global.mAP"}}
BASELINE = {  # what the tables compare with
    "dig_zsl": "Plain Stable Diffusion is the ablation without learnt tokens, on the same noise.",
    "clip_decoder": "CLIP ranks the same labels by their names, without any training.",
    "tagclip": "CLIP sees whole pictures; patches and DMAR, attention refinement, come before the second look."}
COLUMNS = {
    "dig_zsl": "In percent but for CMMD and FID, where less is better. T1: mean per-class accuracy among the unseen "
               "classes. H: harmonic mean of the accuracies of unseen and seen classes among all classes, with \u03bb "
               "chosen on validation classes; \u201coracle\u201d chooses it on the test pictures, a bound and no "
               "result. Agr.: generated pictures in which the CDM, or the judge, which never guides, sees their class.",
    "clip_decoder": "In percent. ZSL ranks the unseen labels alone, GZSL all labels, \u201cseen\u201d those of "
                    "training; a decoder of a closed list knows no others. mAP: mean over labels. F1@3, F1@5: of each "
                    "image's three or five best labels, over all images together.",
    "tagclip": "In percent, without any training. mAP: mean over labels. F1: of the tags that are said, over all "
               "pictures together. mIoU: mean over classes of a pixel, with what takes no method beside it."}
SIZE = (340, 220)
WIDE = 20  # a setting whose largest value is so many times its smallest above 0 has a logarithmic axis
Curve = Mapping[float, Sequence[float]]  # by x, the numbers of all runs


def gathered(runs: Iterable[Run], path: str, x: str, y: str) -> Curve:
  """A list of points of every run, put together by x."""
  found: dict[float, list[float]] = {}
  for run in runs:
    points = merged_runs.entry(run.results, path)
    for point in points if isinstance(points, list) else ():
      if page.known(merged_runs.entry(point, x)) and page.known(merged_runs.entry(point, y)):
        found.setdefault(point[x], []).append(point[y])
  return dict(sorted(found.items()))


def means(curve: Curve) -> list[float]:
  return [statistics.fmean(values) for values in curve.values()]


def deviations(curve: Curve) -> list[float]:
  """Sample standard deviations, 0 for a single number."""
  return [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]


def percent_range(curves: Iterable[Curve]) -> tuple[float, float]:
  """From the tens below all means and deviations to those above, within 0 and 100."""
  ends = [mean + sign * deviation for curve in curves for mean, deviation in zip(means(curve), deviations(curve))
          for sign in (-1, 1)]
  return max(10 * math.floor(min(ends) / 10), 0), min(10 * math.floor(max(ends) / 10 + 1), 100)


def band(axes: page.Axes, curve: Curve, kind: str) -> Html:
  """One standard deviation to both sides of the mean."""
  pairs = list(zip(means(curve), deviations(curve)))
  return axes.band(list(curve), [mean - dev for mean, dev in pairs], [mean + dev for mean, dev in pairs], kind)


def small_multiples(groups: Sequence[Group], curves: Sequence[dict[str, tuple[str, Curve]]], context: str,
                    x_label: str, strokes: str = "", whole: bool = False) -> Html | None:
  """A panel for each group on common axes, None where no run has a curve.

  Args:
    curves: of each group by CSS class, each with what its end is called.
    context: class of the curve that the panels of the other groups show faintly.
    strokes: path in results.json of an x to mark, for each run.
    whole: from 0 to 100, not as far as the curves go.
  """
  every = [curve for of_group in curves for _, curve in of_group.values()]
  if not every:
    return None
  y_range = (0, 100) if whole else percent_range(every)
  axes = page.Axes(*SIZE, (0, max(map(max, every))), y_range, (30, 52, 10, 34))
  panels = []
  for one, own in zip(groups, curves):
    others = (other[context][1] for other in curves if other is not own and context in other)
    parts = [axes.frame(x_label), *(axes.curve(list(curve), means(curve), "thin faint other") for curve in others),
             *(axes.vertical(x, "other dash") for x in (numbers(one.runs, strokes) if strokes else ())),
             *(band(axes, curve, kind) for kind, (_, curve) in own.items() if max(deviations(curve))),
             page.ended_curves(axes, {kind: (name, list(curve), means(curve)) for kind, (name, curve) in own.items()})]
    panels.append(tag("figure", tag("h3", one.label), axes.svg(f"{x_label}: {one.label}", *parts)))
  return tag("div", *panels, class_="three")


def images_curves(groups: Sequence[Group]) -> Html | None:
  """T1 against N_gen."""
  curves = [{kind: ("", curve) for kind in SOURCES
             if (curve := gathered(one.runs, f"images_curve.{kind}", "images", "T1"))} for one in groups]
  panels = small_multiples(groups, curves, "learned", "generated images of a class")
  return panels and page.section(
    "images-curve", "Number of generated images", "T1 of classifiers trained with fewer generated images of each "
    "unseen class, N_gen: mean and one standard deviation over seeds. Faint: learnt tokens of the other rows.",
    page.legend(*SOURCES.items()), panels)


def lambda_curves(groups: Sequence[Group]) -> Html | None:
  """U, S and H against the calibration."""
  curves = [{score.lower(): (f"{score} ", curve) for score in "USH"
             if (curve := gathered(one.runs, "lambda_curve.learned", "lambda", score))} for one in groups]
  panels = small_multiples(groups, curves, "h", "\u03bb", "gzsl.lambda", whole=True)
  return panels and page.section(
    "lambda-curve", "Calibration", "U, S and H of learnt tokens against \u03bb: mean and one standard deviation over "
    "seeds. Dashed: the \u03bb that each run chose on validation classes; its distance to the top of H is what "
    "\u201coracle H\u201d would gain. Faint: H of the other rows.", panels)


def sensitivities(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
  """Numeric fields with the groups that differ in nothing else, in the order of the field's values."""
  found = []
  for field in dict.fromkeys(name for one in groups for name in one.fields):
    alike: dict[str, list[Group]] = {}
    for one in groups:
      if page.known(value := one.fields.get(field)) and not isinstance(value, bool):
        rest = json.dumps({name: other for name, other in one.fields.items() if name != field}, sort_keys=True)
        alike.setdefault(rest, []).append(one)
    found += [(field, sorted(ones, key=lambda one: one.fields[field])) for ones in alike.values() if len(ones) > 1]
  return found


def places(values: Sequence[float]) -> tuple[list[float], str]:
  """Where ascending values stand on an axis, and what to say of it; a logarithmic one has 0 a step before the rest."""
  positive = [value for value in values if value > 0]
  if values[0] < 0 or values[-1] < WIDE * min(positive, default=math.inf):
    return list(values), ""
  logs = [math.log(value) for value in positive]
  zeros = [logs[0] - (logs[-1] - logs[0]) / (len(logs) - 1)] * (len(values) - len(logs))
  return zeros + logs, " (logarithmic but for 0)" if zeros else " (logarithmic)"


def sensitivity(field: str, groups: Sequence[Group], lines: Mapping[tuple[str, str], str]) -> Html:
  """Results against the value of a field; `lines` as of `LINES`."""
  values = [one.fields[field] for one in groups]
  xs, scale = places(values)
  curves = {line: {x: known for x, one in zip(xs, groups) if (known := numbers(one.runs, path))}
            for line, path in lines.items()}
  margin = (xs[-1] - xs[0]) / 16
  axes = page.Axes(*SIZE, (xs[0] - margin, xs[-1] + margin), percent_range(curves.values()), (34, 24, 10, 34))
  parts = [axes.frame(field + scale, x_ticks=[(x, f"{v:g}") for x, v in zip(xs, values)])]
  for shift, ((kind, name), curve) in zip((-3, -1, 1, 3), curves.items()):
    parts.append(axes.curve(list(curve), means(curve), f"thin {kind}"))
    parts += (axes.measurement(x, mean, deviation, kind, f"{name}: {merged_runs.spread(curve[x])}", shift)
              for x, mean, deviation in zip(curve, means(curve), deviations(curve)))
  return tag("figure", tag("h3", field), axes.svg(f"sensitivity to {field}", *parts))


def sensitivity_panels(groups: Sequence[Group]) -> Html | None:
  every = [run for one in groups for run in one.runs]
  lines = {line: path for line, path in LINES[every[0].method].items() if numbers(every, path)}
  panels = [sensitivity(field, ones, lines) for field, ones in sensitivities(groups)]
  return page.section(
    "sensitivity", "Sensitivity", "Rows that differ in one number alone. Dots: means; strokes: one standard deviation "
    "over seeds.", page.legend(*lines), tag("div", *panels, class_="three")) if panels else None


def run_rows(groups: Sequence[Group]) -> Html:
  """What every single run measured, folded away."""
  every = [run for one in groups for run in one.runs]
  columns = {name: path for part in merged_runs.measured(every).values() for name, path in part.items()}
  rows = [("rule" if run is one.runs[-1] else None,
           [f"{one.label}, seed {run.seed}", *merged_runs.cells([run], columns), str(run.folder)])
          for one in groups for run in one.runs]
  return tag("details", tag("summary", "Each run"), page.table(["", *columns, "folder"], rows), class_="merged")


def tables(groups: Sequence[Group], usual: Mapping[str, Any]) -> Html:
  """A row for each group, what only some of them say differently, and their runs."""
  every = [run for one in groups for run in one.runs]
  parts = []
  for title, columns in merged_runs.measured(every).items():
    rows = [(None, [one.label, str(len(one.runs)), *merged_runs.cells(one.runs, columns)]) for one in groups]
    parts.append(tag("div", tag("h3", title), page.table(["settings", "runs", *columns], rows), class_="merged"))
  parts += [tag("p", remark, class_="note") for remark in merged_runs.remarks(groups, usual)]
  method = every[0].method
  return page.section(
    "tables", "Results", f"Mean \u00b1 sample standard deviation over seeds. {BASELINE[method]}", *parts,
    run_rows(groups), tag("p", COLUMNS[method], class_="note"))


def render(compared: Iterable[tuple[list[Group], dict[str, Any]]]) -> str:
  """The page: for each method and data set the tables and curves of its groups."""
  body = []
  for groups, usual in compared:
    body += [tag("header", tag("h1", merged_runs.title(groups)), page.facts([
        ("Settings compared", len(groups)), ("Runs", sum(len(one.runs) for one in groups)),
        ("Seeds", ", ".join(map(str, sorted({run.seed for one in groups for run in one.runs}))))])),
        tables(groups, usual), sensitivity_panels(groups), images_curves(groups), lambda_curves(groups)]
  return page.page("Runs side by side", *body)


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints the tables and writes the page; 1 if anything was left out."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folders", nargs="*", type=pathlib.Path, metavar="DIR", help="a run, or a folder of runs")
  parser.add_argument("--bench", nargs="+", type=pathlib.Path, metavar="FILE", help="lines of benches, not runs")
  parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="default merged_report.html in the first DIR")
  options = parser.parse_args(arguments)
  if bool(options.bench) == bool(options.folders):
    parser.error("either some DIR or --bench FILE... is wanted")
  if options.bench:
    lines, problems = bench_table.read(options.bench)
    print(bench_table.markdown(lines))
    return complain(problems)
  runs, problems = merged_runs.collect(options.folders)
  compared = merged_runs.group(runs)
  for groups, usual in compared:
    print(f"{merged_runs.title(groups)}\n\n{merged_runs.markdown(groups)}\n")
    for remark in merged_runs.remarks(groups, usual):
      print(f"{remark}\n")
  if runs:
    out = options.out or options.folders[0] / "merged_report.html"
    files.write_text(out, render(compared))
    print(f"with curves: {out}")
  return complain(problems)


def complain(problems: Iterable[str]) -> int:
  """Says what was left out; the exit status."""
  problems = list(problems)
  for problem in problems:
    print(f"left out: {problem}", file=sys.stderr)
  return 1 if problems else 0


if __name__ == "__main__":
  sys.exit(main())
