"""results.json, tokens and pictures of a DIG-ZSL run -> report.html, one page that loads nothing.

Reads, beside what the stages `tokens` and `generate` leave, `results.json` of the stage `evaluate`. Of its
keys only `dataset` and `czsl` have to be there; a part of the page whose numbers are missing is left out.
Accuracies and agreements are in percent. `czsl.per_class`, of the run and of each baseline, is {class: T1};
`generated.per_class` is {class: {keys as in `generated`}}, where `plain_sd_` begins what belongs to plain
Stable Diffusion. `lambda_curve` holds, by source ("learned", "plain"), lists of {"lambda":, "U":, "S":, "H":},
`images_curve` lists of {"images":, "T1":}. `quality` is what stage quality returns.

Shapes: n image, h w pixel, c colour channel.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from digzsl_jax import checkpoint, files, processes, report_parts, report_quality
from digzsl_jax import report_page as page
from digzsl_jax.base_workspace import check
from digzsl_jax.data import generated as generated_images
from digzsl_jax.data import images
from digzsl_jax.report_page import Html, join, tag
from digzsl_jax.workspace import TOKENS, Workspace

NEEDS = ("tokens", "generate", "evaluate")
MODELS = ()
OURS, PLAIN = "DIG-ZSL, learnt tokens", "Plain Stable Diffusion"
SOURCES = {"learned": OURS, "plain": PLAIN}
GAUSSIAN = "Gaussian features, no image made"
METHODS = {"dig_zsl": OURS, "gaussian_features": GAUSSIAN}  # what may head `results.json`
SCORES = ("T1", "U", "S", "H")
BASELINES = {"cdm_prototype_residual": "CDM prototype, residual", "cdm_prototype_mlp": "CDM prototype, MLP",
             "clip_zero_shot": "CLIP zero-shot", "gaussian_features": GAUSSIAN, "real_images": "Real images (bound)"}
WITHOUT_IMAGES = {"cdm_prototype": "CDM prototypes", "clip_zero_shot": "those of CLIP"}
AGREEMENTS = {"cdm_agreement": "CDM", "judge_agreement": "Judge", "judge_pair_agreement": "Judge (pair)"}
STOPS = {"accuracy": "target reached", "patience": "no more progress", "cap": "step limit", "nan": "diverged"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the page shows.

  Attributes:
    images_per_class: generated pictures of each unseen class and source.
    thumbnail: longest side in pixels; larger pictures are reduced to it.
    published: rows (method, T1, U, S, H) to print below ours, in percent, None for an unknown number.
  """

  images_per_class: int
  thumbnail: int
  published: tuple[tuple[str, float | None, float | None, float | None, float | None], ...]

  def __post_init__(self):
    check(self.images_per_class >= 1, "images_per_class", self.images_per_class, "at least 1")
    check(self.thumbnail >= 8, "thumbnail", self.thumbnail, "at least 8 pixels")
    for row in self.published:
      good = (isinstance(row, tuple | list) and len(row) == 5 and isinstance(row[0], str)
              and all(value is None or page.known(value) for value in row[1:]))
      check(good, "published", row, "rows (method, T1, U, S, H), numbers in percent or None")


def complete(ws: Workspace, folder: pathlib.Path) -> bool:
  """Whether `report.html` is there; it lies outside the stage's folder."""
  return (ws.workdir / "report.html").exists()


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `report.html` into the working directory."""
  if not processes.is_first():
    return {}
  path = ws.workdir / "results.json"
  if not path.exists():
    raise ValueError(f"{path} is missing; run the stage evaluate, which writes it")
  results = files.read_json(path)
  made = lambda part, *arguments: part(*arguments) if ws.dataset.has_images else None
  parts = [header(results, ws), headline(results, settings.published, ws.config["tokens"]["guide"]),
           protocol(results, ws.dataset.notes), made(grids, results, ws, settings),
           report_quality.section(results.get("quality"), ws.dataset.names, SOURCES),
           class_bars(results, ws.dataset.names), made(token_map, ws), made(loss_curves, ws), lambda_curves(results),
           images_curve(results), report_parts.stage_times(results, ws.stages),
           report_parts.appendix(results, ws.config)]
  text = page.page(title(results), *parts)
  files.write_text(ws.workdir / "report.html", text)
  return {"bytes": len(text)}


def scores(entry: Mapping[str, Any], gzsl: str = "gzsl") -> dict[str, Any]:
  """T1, U, S, H, lambda of results or of a baseline."""
  found = entry.get("czsl", {}) | entry.get(gzsl, {})
  return {name: found.get(name) for name in (*SCORES, "lambda")}


def baseline(results: Mapping, name: str) -> Mapping:
  return results.get("baselines", {}).get(name, {})


def ours_name(results: Mapping) -> str:
  """What heads the results: DIG-ZSL, where there are images."""
  return METHODS[results.get("method", "dig_zsl")]


def title(results: Mapping) -> str:
  return f"{ours_name(results).partition(',')[0]} on {results['dataset']}"


def header(results: Mapping, ws: Workspace) -> Html:
  """Title, the finding in words, and what it was measured with."""
  classes = results.get("classes", {})
  pairs = [("Data set", results["dataset"]),
           ("Classes", f"{classes.get('seen', '?')} seen, {classes.get('unseen', '?')} unseen"),
           ("Seed", results.get("seed", ws.seed)), ("Devices", results.get("devices", "not recorded")),
           ("Time before this page", report_parts.duration(sum(results.get("seconds", {}).values())))]
  versions = ws.workdir / "versions.json"
  if versions.exists():
    found = report_parts.ordered(files.read_json(versions), ("digzsl_jax", "git", "jax", "flax"))
    pairs.append(("Versions", ", ".join(f"{name} {version}" for name, version in found.items())))
  warned = [tag("p", tag("b", "Warning: "), text, class_="alarm") for text in results.get("warnings", ())]
  finding = warned or [tag("p", verdict(results), class_="verdict")]  # not both: the one takes back the other
  return join(tag("header", tag("h1", title(results)), *finding, page.facts(pairs)), alarm(results))


def verdict(results: Mapping) -> str:
  """What happened, in a few sentences, also when it is nothing or a loss."""
  ours, plain = scores(results), scores(baseline(results, "plain_sd"))
  generated = results.get("generated", {})
  ours["Judge"], plain["Judge"] = (generated.get(f"{source}judge_agreement") for source in ("", "plain_sd_"))
  if not (page.known(ours["T1"]) and page.known(plain["T1"])):
    return f"T1 on the unseen classes: {page.number(ours['T1'])} %."
  gain = ours["T1"] - plain["T1"]
  verb = "raise" if gain > 0 else "lower" if gain < 0 else "do not change"
  text = (f"Learnt class tokens {verb} T1 on the unseen classes: {plain['T1']:.1f} \u2192 {ours['T1']:.1f} % "
          f"({gain:+.1f} points against plain Stable Diffusion on the same noise)")
  if page.known(closed := results.get("gap_closed")) and closed > 0:
    text += f", {100 * closed:.0f} % of the way to real training images"
  for key, label in (("H", "Seen and unseen together: H"), ("Judge", "Pictures that the judge recognises:")):
    if page.known(ours[key]) and page.known(plain[key]):
      text += f". {label} {plain[key]:.1f} \u2192 {ours[key]:.1f} %"
  text += "."
  reached = {label: scores(baseline(results, key))["T1"] for key, label in WITHOUT_IMAGES.items()}
  better = [f"{label} reach {t1:.1f} %" for label, t1 in reached.items() if page.known(t1) and t1 > ours["T1"]]
  return text + (f" Without generating any image, {' and '.join(better)}." if better else "")


def alarm(results: Mapping) -> Html | None:
  """The sign of tokens that please the CDM without showing the class."""
  found = results.get("generated", {})
  rise = {key: found[key] - found[f"plain_sd_{key}"] for key in AGREEMENTS
          if page.known(found.get(key)) and page.known(found.get(f"plain_sd_{key}"))}
  falls = [f"{AGREEMENTS[key]} by {-change:.1f}" for key, change in rise.items() if change < 0]
  if not falls or rise.get("cdm_agreement", 0) <= 0:
    return None
  return tag("p", tag("b", "The tokens may be fooling the CDM: "), f"its agreement rises by "
             f"{rise['cdm_agreement']:.1f} points while that of the independent judge falls: "
             f"{', '.join(falls)}.", class_="alarm")


def baseline_rows(baselines: Mapping, guide: str) -> Iterator[tuple[str | None, str, Mapping]]:
  """(CSS class, name, entry) of each baseline but plain_sd; `guide` is that of the config."""
  chosen = baselines.get("cdm_prototype")  # the same numbers as those of the kind of head that the config names
  for key, entry in report_parts.ordered(baselines, BASELINES).items():
    name = BASELINES.get(key, spoken(key))
    of_cdm = key.startswith("cdm_prototype_") and entry == chosen
    if of_cdm if guide == "cdm" else key == "clip_zero_shot":
      name += " (guides the tokens)"
    if key not in ("plain_sd", "cdm_prototype"):
      yield "real" if key == "real_images" else None, name, entry


def spoken(key: str) -> str:
  return key.replace("_", " ")


def headline(results: Mapping, published: Sequence, guide: str) -> Html:
  """The table of results: ours, plain, difference, baselines, oracle, published."""
  generated, plain = results.get("generated", {}), baseline(results, "plain_sd")
  agreements = [key for key in AGREEMENTS if page.known(generated.get(key))]
  columns = (*SCORES, "lambda", *agreements)

  def row(kind, name, entry):
    return kind, [name, *(page.number(entry.get(key), 2 if key == "lambda" else 1) for key in columns)]

  ours = scores(results) | generated
  rows = [row("learned", ours_name(results), ours)]
  if plain:
    base = scores(plain) | {key: generated.get(f"plain_sd_{key}") for key in agreements}
    changes = ("" if key == "lambda" else page.change(ours[key], base[key]) for key in columns)
    rows += [row("plain", PLAIN, base), ("delta", ["Difference in points", *changes])]
  baselines = baseline_rows(results.get("baselines", {}), guide)
  rows += [row(kind, name, scores(entry)) for kind, name, entry in baselines]
  rows += [row("oracle", f"{name.split(',')[0]}, oracle \u03bb", scores(entry, "gzsl_oracle"))
           for name, entry in ((ours_name(results), results), (PLAIN, plain)) if "gzsl_oracle" in entry]
  rows += [row("published", f"{name} (published)", dict(zip(SCORES, values))) for name, *values in published]
  return page.section(
    "accuracy", "Accuracy", "Compare the first two rows, where only the token differs, and then the bound on "
    "real images, which says how much there was to gain." if plain else "The first row is a classifier that was "
    "trained on features drawn for the unseen classes; the prototypes classify without any.",
    page.table(["", *SCORES, "\u03bb", *(AGREEMENTS[key] for key in agreements)], rows),
    tag("p", "All in percent. T1: mean per-class accuracy among the unseen classes. U and S: that of unseen "
        "and of seen test pictures among all classes; H: their harmonic mean; \u03bb: the calibration, "
        "chosen on validation classes. CDM and Judge: generated pictures recognised as their class, by the "
        "CDM and a classifier that never guides, exactly or up to words that captions mix up. Bounds, "
        "not results: \u201creal images\u201d trains the same classifier on real pictures of the unseen "
        "classes, and an oracle row chooses \u03bb on the test pictures.", class_="note"))


def protocol(results: Mapping, notes: Sequence[str]) -> Html | None:
  """What was counted: images of each part, averages by class and by image, and what the data set has to say."""
  counts, classes = results.get("images"), results.get("classes", {})
  if not counts:
    return None
  by_class = results["czsl"] | results.get("gzsl", {})
  by_image = by_class.get("per_image", {}) | {"T1": results["czsl"]["T1_per_image"]}
  rows = [(None, [f"{score}: {text}", classes[part], f"{counts[f'test_{part}']:,}",
                  *(page.number(found.get(score), 2) for found in (by_class, by_image))])
          for score, part, text in (
              ("T1", "unseen", "unseen classes among themselves"), ("U", "unseen", "unseen classes among all"),
              ("S", "seen", "seen classes among all"))]
  made = counts.get("generated_per_class")
  text = f"Trained on {counts['train']:,} images of {classes['seen']} seen classes"
  text += f" and {made:,} generated ones of each of {classes['unseen']} unseen classes." if made else "."
  return page.section(
    "protocol", "What was counted", "The field averages accuracy over classes; averaged over images, classes with many "
    "count more. Published code differs in which it does, so compare like with like.",
    page.table(["", "classes", "test images", "mean over classes", "share of images"], rows, wide=False),
    tag("p", f"{text} The rows above choose \u03bb on validation classes, cut from the seen ones; published code "
        "mostly chooses \u03bb, and the epoch, on the test images: that is the row \u201coracle\u201d.", class_="note"),
    *(tag("p", note, class_="note") for note in notes))


def strip(pictures: Sequence[np.ndarray], columns: int, source: str, name: str, longest: int) -> Html:
  """Pictures `[h, w, c]` of one class and source in a grid of `columns`, no side longer than `longest` pixels."""
  cells = (tag("img", src=report_parts.data_uri(picture, longest), alt=f"{name}, {source}, {index}",
               class_="pixels" if max(picture.shape[:2]) <= 64 else None)
           for index, picture in enumerate(pictures))
  return tag("div", *cells, class_=f"strip {source}",
             style=f"grid-template-columns: repeat({columns}, minmax(0, 1fr))")


def agreement_table(found: Mapping) -> Html | None:
  """Agreement of one class's pictures, plain beside learnt."""
  rows = [(None, [label, page.number(found.get(f"plain_sd_{key}"), 0), page.number(found.get(key), 0)])
          for key, label in AGREEMENTS.items() if page.known(found.get(key))]
  heads = ("%", tag("span", "plain", class_="plain"), tag("span", "learnt", class_="learned"))
  return page.table(heads, rows, wide=False) if rows else None


def grids(results: Mapping, ws: Workspace, settings: Settings) -> Html:
  """Per unseen class: plain above learnt, a column per noise, and real pictures beside."""
  folder, real = ws.folder("generate") / "test", ws.dataset.test_unseen
  names = {ws.dataset.names[label]: label for label in ws.dataset.unseen}
  manifest = generated_images.read_manifest(folder, list(names))
  made = report_parts.ordered(manifest["files"], ("plain", "learned"))
  per_class = results.get("generated", {}).get("per_class", {})
  columns = min(settings.images_per_class, manifest["images"])
  side = max(1, columns // 2)  # real pictures get half the columns, in as many rows
  rows = []
  for name, label in names.items():
    strips = [strip([images.read_png(folder / path) for path in paths[name][:columns]], columns, source, name,
                    settings.thumbnail) for source, paths in made.items()]
    real_nhwc = real.images_nhwc[np.flatnonzero(real.labels_n == label)[:side * len(made)]]
    rows.append(tag("article", tag("div", tag("h3", name), agreement_table(per_class.get(name, {}))),
                    tag("div", *strips), strip(real_nhwc, side, "real", name, settings.thumbnail),
                    class_="pair"))
  head = tag("div", tag("span"), page.legend(*((source, SOURCES[source]) for source in made)),
             page.legend(("real", "real test pictures, for the eye only")), class_="pair head")
  return page.section(
    "pictures", "Plain and learnt on the same noise", "Pictures above one another start from the same noise, "
    "so what differs comes from the token: look for the attribute that the plain picture gets wrong, and for "
    "tints or fragments that the token brought in.", head, *rows)


def class_bars(results: Mapping, names: Sequence[str]) -> Html | None:
  """T1 of each unseen class, plain and learnt, and the bound."""
  ours, plain, real = ((entry.get("czsl") or {}).get("per_class") or {} for entry in (
      results, baseline(results, "plain_sd"), baseline(results, "real_images")))
  if not ours:
    return None
  shown = {source: values for source, values in (("plain", plain), ("learned", ours)) if values}
  series = [(source, SOURCES[source]) for source in shown]
  rows = [(name, [values.get(name) for values in shown.values()]) for name in report_parts.ordered(ours, names)]
  keys = page.legend(*series, *([("real", "trained on real images (stroke)")] if real else []))
  return page.section(
    "classes", "Accuracy by class", "T1 of each unseen class in percent: between the bars lies what the "
    "token brought, between bar and stroke what generation still lacks.", keys,
    page.bars(rows, series, 100, "T1 by class", [real.get(name) for name, _ in rows]))


def token_map(ws: Workspace) -> Html | None:
  """t-SNE of all tokens, every vector a point, and of the word that they replace."""
  points = [(ws.config["tokens"]["initial"], "cross", ws.initial_token)]
  for task, marker in (("test", "dot"), ("validation", "ring")):
    if (path := ws.folder("tokens") / TOKENS[task]).exists():
      found = report_parts.ordered(checkpoint.read_arrays(path), ws.dataset.names)
      points += [(name, marker, vector_d) for name, token in found.items() for vector_d in np.atleast_2d(token)]
  if len(points) < 5:
    return None
  placed = page.tsne(np.stack([vector_d for *_, vector_d in points]), min(30, (len(points) - 1) / 3)).tolist()
  marks = [(*place, name, marker) for place, (name, marker, _) in zip(placed, points)]
  return page.section(
    "tokens", "Token map", "t-SNE of the class tokens (dots are unseen classes, rings validation classes, "
    "the cross the word of plain prompts): tokens that lie together are similar words to the generator, "
    "so look for neighbours that share an attribute; axes and long distances mean nothing.",
    tag("figure", page.scatter(marks, "t-SNE of the tokens")))


def loss_curves(ws: Workspace) -> Html | None:
  """A small panel per class, those of a task on one scale; validation classes folded away."""
  paths = {task: ws.folder("tokens") / f"{task}_curves.json" for task in TOKENS}
  found = {task: report_parts.ordered(files.read_json(path), ws.dataset.names) for task, path in paths.items()
           if path.exists()}
  panels = {}
  for task, curves in found.items():
    losses = [v for curve in curves.values() for v in curve["loss"] if page.known(v)]
    limit = float(np.quantile(losses, 0.99)) * 1.1 if losses else 1.0
    panels[task] = tag("div", *(loss_panel(*pair, limit) for pair in curves.items()), class_="many")
  if not panels:
    return None
  if "validation" in panels:
    panels["validation"] = tag("details", tag("summary", "Validation classes"), panels["validation"])
  keys = page.legend(("learned", "loss (numbers on the axis)"),
                     ("other", "the guide's accuracy, bottom 0, top 100 %"), ("real", "step whose token is kept"))
  return page.section(
    "losses", "Token learning", "One panel per class, those of a task on one axis: a falling line and a rising thin "
    "one mean that the token leads the generator to the class, a flat pair that it never did.", keys,
    *panels.values())


def loss_panel(name: str, curve: Mapping, limit: float) -> Html:
  """Loss of one class up to `limit`, the guide's accuracy, and the step whose token is kept."""
  loss, accuracy, kept = curve["loss"], curve.get("accuracy", []), curve.get("best_step")
  axes = page.Axes(230, 120, (0, max(len(loss) - 1, 1)), (0, limit), (28, 8, 6, 18))
  share = dataclasses.replace(axes, y_range=(0, 1))
  shown = [min(v, limit) if page.known(v) else None for v in loss]
  svg = axes.svg(f"loss of {name}", axes.frame(count=3),
                 None if kept is None else axes.vertical(kept, "real"),
                 share.curve(range(len(accuracy)), accuracy, "thin other"),
                 axes.curve(range(len(loss)), shown, "learned"))
  steps, stop = f"{len(loss)} step{'s' * (len(loss) != 1)}", STOPS.get(curve.get("stopped"), "")
  return tag("figure", tag("h3", name), svg, tag("figcaption", ", ".join(filter(None, (steps, stop)))))


def lambda_curves(results: Mapping) -> Html | None:
  """U, S and H against the calibration."""
  found = results.get("lambda_curve") or {}
  entries = {"learned": results, "plain": baseline(results, "plain_sd")}
  panels = [lambda_panel(SOURCES[source], found[source], entry) for source, entry in entries.items()
            if found.get(source)]
  guide = ("A larger \u03bb takes more from the scores of seen classes, so U rises and S falls; the chosen \u03bb "
           "should stand near the top of H, and its distance to the oracle is what choosing without test "
           "pictures costs.")
  return page.section("lambda-curve", "Calibration", guide, tag("div", *panels, class_="panels")) if panels else None


def lambda_panel(title: str, points: Sequence[Mapping], entry: Mapping) -> Html:
  """U, S and H of one source, with the chosen lambda and, where there is one, the oracle's."""
  points = sorted(points, key=lambda point: point["lambda"])
  xs = [point["lambda"] for point in points]
  axes = page.Axes(500, 290, (xs[0], xs[-1]), (0, 100), (34, 62, 36, 34))
  parts = [axes.frame("\u03bb")]
  for name, gzsl, kind, lift in (("oracle", "gzsl_oracle", "other dash", 14), ("chosen", "gzsl", "h", 0)):
    found = scores(entry, gzsl)
    if (gzsl in entry or name == "chosen") and page.known(found["lambda"]) and xs[0] <= found["lambda"] <= xs[-1]:
      text = f"{name} {found['lambda']:.3g}, H {page.number(found['H'])}"
      parts.append(axes.vertical(found["lambda"], kind, text, lift))
  lines = {name.lower(): (f"{name} ", xs, [point.get(name) for point in points]) for name in "USH"
           if page.known(points[-1].get(name))}
  return tag("figure", tag("h3", title),
             axes.svg(f"{title}: U, S, H against \u03bb", *parts, page.ended_curves(axes, lines)))


def images_curve(results: Mapping) -> Html | None:
  """T1 against the number of generated images of a class (N_gen)."""
  found = {source: points for source in SOURCES if (points := (results.get("images_curve") or {}).get(source))}
  if not found:
    return None
  counts = [point["images"] for point in next(iter(found.values()))]  # the same for every source
  axes = page.Axes(500, 290, (0, counts[-1]), (0, 100), (34, 62, 20, 34))
  lines = {source: ("", counts, [point["T1"] for point in points]) for source, points in found.items()}
  return page.section(
    "images-curve", "Number of generated images", "T1 of classifiers trained with fewer generated images of each "
    "unseen class: where a line is flat, more of the same images would not help.",
    page.legend(*((source, SOURCES[source]) for source in found)),
    tag("figure", axes.svg("T1 against generated images", axes.frame("generated images of a class"),
                           page.ended_curves(axes, lines))))
