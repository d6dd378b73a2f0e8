"""results.json and scores of a multi-label run -> report.html, one page that loads nothing.

Shapes: n test image, k label.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from digzsl_jax import checkpoint, files, processes, report_parts
from digzsl_jax import report_page as page
from digzsl_jax.base_workspace import check
from digzsl_jax.decoder_workspace import DecoderWorkspace
from digzsl_jax.report_page import Html, join, tag

NEEDS = ("train", "evaluate")
MODELS = ()
METHODS = {"clip_decoder": "CLIP-Decoder", "last_weights": "CLIP-Decoder, last weights",
           "clip_zero_shot": "CLIP zero-shot", "random_scores": "Random scores"}
PARTS = {"zsl": "Unseen labels (ZSL)", "gzsl": "All labels (GZSL)", "seen": "Seen labels"}
SHORT = {"zsl": "ZSL", "gzsl": "GZSL", "seen": "seen"}
LINES = {"loss": "learned", "asl": "plain", "clip": "other"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the page shows.

  Attributes:
    examples: test pictures with their tags.
    tags: of each picture.
    labels: with bars, at most, of each list: those of highest and lowest average precision.
    thumbnail: longest side of a picture in pixels.
    published: rows (method, mAP, F1@3, F1@5 of ZSL, the same of GZSL) in percent, None for an unknown number.
  """

  examples: int
  tags: int
  labels: int
  thumbnail: int
  published: tuple[tuple[str | float | None, ...], ...]

  def __post_init__(self):
    for field, least in (("examples", 0), ("tags", 1), ("labels", 2), ("thumbnail", 8)):
      check(getattr(self, field) >= least, field, getattr(self, field), f"at least {least}")
    for row in self.published:
      check(len(row) == 7 and isinstance(row[0], str), "published", row, "rows (method, three numbers, three numbers)")


def complete(ws: DecoderWorkspace, folder: pathlib.Path) -> bool:
  """Whether `report.html` is there; it lies outside the stage's folder."""
  return (ws.workdir / "report.html").exists()


def run(settings: Settings, ws: DecoderWorkspace, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `report.html` into the working directory."""
  if not processes.is_first():
    return {}
  results = files.read_json(ws.workdir / "results.json")
  parts = [header(results, ws), headline(results), published(results, settings),
           *(label_bars(results, part, settings.labels) for part in ("zsl", "seen") if part in results),
           examples(ws, results, settings), losses(ws), report_parts.stage_times(results, ws.stages),
           report_parts.appendix(results, ws.config)]
  text = page.page(title(results), *parts)
  files.write_text(ws.workdir / "report.html", text)
  return {"bytes": len(text)}


def title(results: Mapping) -> str:
  return f"{METHODS[results['method']]} on {results['dataset']}"


def header(results: Mapping, ws: DecoderWorkspace) -> Html:
  """Title, the finding in words, and what it was measured with."""
  labels, images = results["labels"], results["images"]
  pairs = [("Data set", results["dataset"]), ("Labels", f"{labels['seen']} seen, {labels['unseen']} unseen"),
           ("Images", f"{images['train']} for training, {images['test']} for test"), ("Seed", results["seed"]),
           ("Devices", results["devices"]),
           ("Time before this page", report_parts.duration(sum(results["seconds"].values())))]
  warned = [tag("p", tag("b", "Warning: "), text, class_="alarm") for text in results["warnings"]]
  return tag("header", tag("h1", title(results)), *(warned or [tag("p", verdict(results), class_="verdict")]),
             page.facts(pairs))


def verdict(results: Mapping) -> str:
  """What came out, also where it is nothing or a loss."""
  part = "zsl" if "zsl" in results else "seen"
  ours, found = results[part]["mAP"], {name: entry[part]["mAP"] for name, entry in results["baselines"].items()}
  what = "labels that training never saw" if part == "zsl" else "the labels"
  text = f"mAP over {what}: {ours:.1f} %, where chance gives {found['random_scores']:.1f} %"
  if (clip := found.get("clip_zero_shot")) is None:
    return text + "."
  return text + f" and CLIP without any training {clip:.1f} %" + (
      ". CLIP alone is better." if clip > ours else ".")


def headline(results: Mapping) -> Html:
  """Every method and list."""
  entries = {results["method"]: results} | report_parts.ordered(results["baselines"], METHODS)
  present = [part for part in PARTS if part in results]

  def rows(columns):
    for name, entry in entries.items():
      values = (page.number(entry[part].get(key)) for part, key in columns)
      yield "learned" if name == results["method"] else None, [METHODS[name], *values]

  tops = sorted(int(key[3:]) for key in results[present[0]] if key.startswith("F1@"))
  main = [(part, key) for part in present for key in ("mAP", *(f"F1@{top}" for top in tops))]
  rest = [(part, f"{letter}@{top}") for part in present for top in tops for letter in "PR"]
  head = lambda columns: ["", *(f"{SHORT[part]} {key}" for part, key in columns)]
  return page.section(
      "results", "Results", "In percent. ZSL ranks the unseen labels alone, GZSL all labels, which is harder: seen "
      "ones compete. mAP is the mean over labels; P, R and F1 count each image's best tags, over all images together.",
      page.table(head(main), rows(main)),
      tag("details", tag("summary", "Precision and recall"), page.table(head(rest), rows(rest))))


def published(results: Mapping, settings: Settings) -> Html | None:
  """What papers report, beside ours."""
  if not settings.published or "zsl" not in results:
    return None
  keys = ("mAP", "F1@3", "F1@5")
  ours = [METHODS[results["method"]] + ", this run",
          *(results[part].get(key) for part in ("zsl", "gzsl") for key in keys)]
  rows = [(kind, [row[0], *map(page.number, row[1:])])
          for kind, row in (("learned", ours), *((None, row) for row in settings.published))]
  return page.section("published", "Beside published numbers", "Protocols differ: some leave out images without a "
                      "label of the list, which raises mAP. The config says which this run used.",
                      page.table(["", *(f"{part} {key}" for part in ("ZSL", "GZSL") for key in keys)], rows))


def label_bars(results: Mapping, part: str, most: int) -> Html:
  """Average precision of each label, ours and CLIP's."""
  entries = {"learned": (results["method"], results),
             "plain": ("clip_zero_shot", results["baselines"].get("clip_zero_shot"))}
  shown = {kind: (METHODS[name], entry[part]["per_label"]) for kind, (name, entry) in entries.items() if entry}
  return report_parts.label_bars(f"labels-{part}", PARTS[part], "Average precision of each label in percent, best "
                                 "first: where do names alone carry, and where do they not?", shown, most)


def examples(ws: DecoderWorkspace, results: Mapping, settings: Settings) -> Html | None:
  """Test pictures, their best tags among all labels, and which of these are right."""
  dataset = ws.dataset
  if not dataset.has_images:
    return None
  scores_nk = checkpoint.read_arrays(ws.folder("evaluate") / "scores.safetensors")[results["method"]]
  unseen_n = (dataset.test.targets_nk[:, list(dataset.unseen)] == 1).sum(1)
  rows = np.argsort(-unseen_n, kind="stable")[:settings.examples]
  cells = []
  for row, picture in zip(rows, dataset.test.images_nhwc[rows]):
    best = [k for k in np.argsort(-scores_nk[row]) if not np.isnan(scores_nk[row, k])][:settings.tags]
    missed = [k for k in np.flatnonzero(dataset.test.targets_nk[row] == 1) if k not in best]
    lines = [tag("li", ("\u2713 " if dataset.test.targets_nk[row, k] == 1 else "\u2717 ") + dataset.names[k]
                 + (" (unseen)" if k in dataset.unseen else "")) for k in best]
    lines += [tag("li", f"missed: {dataset.names[k]}" + (" (unseen)" if k in dataset.unseen else "")) for k in missed]
    pixels = "pixels" if max(picture.shape[:2]) <= 64 else None
    cells.append(tag("figure", tag("img", src=report_parts.data_uri(picture, settings.thumbnail), class_=pixels,
                                   alt=f"test picture {row}", width=settings.thumbnail), tag("ul", *lines)))
  return page.section("examples", "Pictures and their tags", f"The {settings.tags} labels of highest score among all; "
                      "pictures with many unseen labels first.", tag("div", *cells, class_="many")) if cells else None


def losses(ws: DecoderWorkspace) -> Html | None:
  """Loss and its parts against the update, each on its own scale."""
  found: dict[int, dict] = {}
  for line in (ws.workdir / "metrics.jsonl").read_text().splitlines():
    entry = json.loads(line)
    if entry["stage"] == "train":
      found[entry["step"]] = entry
  if len(found) < 2:
    return None
  steps, panels = sorted(found), []
  for name, kind in LINES.items():
    values = [found[step][name] for step in steps]
    axes = page.Axes(320, 160, (0, steps[-1]), (min(0, *values), max(values) or 1), (52, 8, 6, 18))
    panels.append(tag("figure", tag("h3", name), axes.svg(name, axes.frame(count=4), axes.curve(steps, values, kind))))
  return page.section("losses", "Training", "Of single batches: the weighted sum, the asymmetric loss summed over "
                      "batch and labels, and the CLIP loss.", join(tag("div", *panels, class_="many")))
