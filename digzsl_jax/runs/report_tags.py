"""results.json, scores and masks of a run of TagCLIP -> report.html, one page that loads nothing.

Shapes: n test picture, f label, h w pixel, c colour channel.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from digzsl_jax import files, mask_files, report_parts
from digzsl_jax import report_page as page
from digzsl_jax.base_workspace import check
from digzsl_jax.data import label_maps, true_masks
from digzsl_jax.report_page import Html, tag
from digzsl_jax.tag_workspace import TagWorkspace

NEEDS = ("tags", "evaluate")
IF_THERE = ("masks",)
MODELS = ()
METHODS = {"global": "CLIP, whole picture", "patch": "Patches", "dmar": "+ attention refinement (DMAR)",
           "tagclip": "+ second look (CWR) = TagCLIP"}
WAYS = {"masks": "CLS-SEG with these tags", "best_tag": "Every pixel its picture's best tag",
        "all_background": "Everything background"}
RIGHT, WRONG = "\u2713", "\u2717"
MOST = 4000  # pictures that examples are chosen among


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the page shows.

  Attributes:
    examples: test pictures with their tags and masks.
    labels: with bars, at most: those of highest and lowest average precision.
    thumbnail: longest side of a picture in pixels.
    published: rows (method, mAP, mIoU) in percent, None for an unknown number.
  """

  examples: int
  labels: int
  thumbnail: int
  published: tuple[tuple[str | float | None, ...], ...]

  def __post_init__(self):
    for field, least in (("examples", 0), ("labels", 2), ("thumbnail", 8)):
      check(getattr(self, field) >= least, field, getattr(self, field), f"at least {least}")
    for row in self.published:
      check(len(row) == 3 and isinstance(row[0], str), "published", row, "rows (method, number, number)")


def complete(ws: TagWorkspace, folder: pathlib.Path) -> bool:
  """Whether `report.html` is there; it lies outside the stage's folder."""
  return (ws.workdir / "report.html").exists()


def run(settings: Settings, ws: TagWorkspace, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `report.html` into the working directory."""
  results = files.read_json(ws.workdir / "results.json")
  shown = {"learned": (METHODS["tagclip"], results["per_label"]),
           "plain": (METHODS["global"], results["baselines"]["global"]["per_label"])}
  parts = [header(results, ws), tags(results), masks(results), published(results, settings),
           report_parts.label_bars("labels", "Labels", "Average precision of each label in percent, best first: which "
                                   "names does the method find, and which does CLIP?", shown, settings.labels),
           examples(ws, settings), report_parts.stage_times(results, ws.stages),
           report_parts.appendix(results, ws.config)]
  text = page.page(title(results), *parts)
  files.write_text(ws.workdir / "report.html", text)
  return {"bytes": len(text)}


def title(results: Mapping) -> str:
  return f"TagCLIP on {results['dataset']}"


def header(results: Mapping, ws: TagWorkspace) -> Html:
  """Title, the finding in words, and what it was measured with."""
  tagging = results["tagging"]
  pairs = [("Data set", results["dataset"]), ("Model", ws.models.clip), ("Pictures", tagging["pictures"]),
           ("Labels", f"{results['labels']}, background {len(results['background'])}"),
           ("Second looks", f"{tagging['looks'] / tagging['pictures']:.2f} a picture"),
           ("Padded shapes", f"{tagging['shapes']}, {100 * tagging['padding']:.1f} % padding"),
           ("Devices", results["devices"]),
           ("Time before this page", report_parts.duration(sum(results["seconds"].values())))]
  warned = [tag("p", tag("b", "Warning: "), text, class_="alarm") for text in results["warnings"]]
  return tag("header", tag("h1", title(results)), *(warned or [tag("p", verdict(results), class_="verdict")]),
             page.facts(pairs))


def verdict(results: Mapping) -> str:
  """What came out, also where it is nothing or a loss."""
  whole = results["baselines"]["global"]
  text = (f"mAP {results['mAP']:.1f} % and F1 {results['F1']:.1f} % without any training; the same CLIP that looks at "
          f"whole pictures has {whole['mAP']:.1f} % and {whole['F1']:.1f} %.")
  steps = [*results["baselines"], "tagclip"]
  steps = [name for name in METHODS if name in steps]
  entries = results["baselines"] | {"tagclip": results}
  lost = [METHODS[new] for old, new in zip(steps, steps[1:]) if entries[new]["mAP"] < entries[old]["mAP"]]
  text += f" Against the step before it, mAP falls with: {', '.join(lost)}." if lost else ""
  if "mIoU" in results:
    trivial = max(entry["mIoU"] for way, entry in results["masks"].items() if way != "masks")
    text += f" Masks: mIoU {results['mIoU']:.1f} %, where the better trivial way has {trivial:.1f} %."
  return text


def tags(results: Mapping) -> Html:
  """Every step of the method."""
  entries = report_parts.ordered(results["baselines"] | {"tagclip": results}, METHODS)
  columns = ("mAP", "F1", "P", "R")
  rows = [("learned" if name == "tagclip" else None,
           [METHODS[name], *(page.number(entry[column]) for column in columns),
            page.number(entry["tags_per_picture"], 2)]) for name, entry in entries.items()]
  return page.section(
      "results", "Tags", "In percent, step by step as the method has them. mAP is the mean over labels of the average "
      "precision over pictures; F1, precision and recall are of all tags together, said where a score is above the "
      "threshold between the picture's lowest and highest.", page.table(["", *columns, "tags a picture"], rows))


def masks(results: Mapping) -> Html | None:
  """mIoU, and IoU of every class."""
  if "masks" not in results:
    return None
  rows = [("learned" if way == "masks" else None, [WAYS[way], page.number(entry["mIoU"])])
          for way, entry in results["masks"].items()]
  each = results["masks"]["masks"]["per_class"]
  order = sorted(each, key=lambda name: -1 if each[name] is None else -each[name])
  return page.section(
      "masks", "Masks", "Mean intersection over union in percent, over all pixels of all pictures, beside what takes "
      "no method at all.", page.table(["", "mIoU"], rows, wide=False),
      tag("details", tag("summary", "Every class"),
          page.table(["", "IoU"], [(None, [name, page.number(each[name])]) for name in order], wide=False)))


def published(results: Mapping, settings: Settings) -> Html | None:
  """What papers report, beside ours."""
  if not settings.published:
    return None
  ours = ["This run", results["mAP"], results.get("mIoU")]
  rows = [(kind, [row[0], *map(page.number, row[1:])])
          for kind, row in (("learned", ours), *((None, row) for row in settings.published))]
  return page.section("published", "Beside published numbers", "Those are of CLIP ViT-B/16.",
                      page.table(["", "mAP", "mIoU"], rows))


def examples(ws: TagWorkspace, settings: Settings) -> Html | None:
  """Test pictures with their tags, the masks over them and, where it is known, what they truly show."""
  dataset = ws.dataset
  scores_nf = ws.scores()["tagclip"]
  tags_nf = ws.tags(scores_nf)
  cells = []
  for row, pictures in views(ws, settings):
    is_true_f = dataset.test.targets_nk[row] == 1
    lines = [tag("li", f"{RIGHT if is_true_f[k] else WRONG} {dataset.names[k]} {scores_nf[row, k]:.2f}")
             for k in np.argsort(-scores_nf[row]) if tags_nf[row, k]]
    missed = np.flatnonzero(is_true_f & ~tags_nf[row])
    lines += [tag("li", f"missed: {dataset.names[k]}") for k in missed]
    strip = tag("div", *(tag("img", src=report_parts.data_uri(picture, settings.thumbnail), alt=what, title=what,
                             width="100%") for what, picture in pictures.items()),
                style=f"display:grid;gap:4px;align-items:start;grid-template-columns:repeat({len(pictures)},1fr)")
    cells.append(tag("figure", strip, tag("ul", *lines)))
  return page.section("examples", "Pictures, tags and masks", "From left to right: the picture, the masks of its tags "
                      "and, where the data set has them, the true masks. Tags best first, with their score.",
                      tag("div", *cells, class_="panels")) if cells else None


def views(ws: TagWorkspace, settings: Settings) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Rows of test pictures, those with many labels first, and of each what is to be seen beside each other."""
  pictures, targets_nf = ws.pictures(ws.config["tags"]["most_patches"]), ws.dataset.test.targets_nk
  palette_vc, has_masks = mask_files.palette(len(ws.dataset.names) + 1), ws.stages["masks"].done
  truth = true_masks.open(ws.config["data"], ws.dataset) if has_masks else None
  listed = files.read_json(ws.folder("masks") / "manifest.json")["masks"] if has_masks else ()
  order = np.argsort(-(targets_nf[:MOST] == 1).sum(1), kind="stable")
  for row in order[:settings.examples].tolist():
    image_hwc = pictures.shown(row)
    nothing_hw = np.full(image_hwc.shape[:2], label_maps.BACKGROUND)
    seen = {"picture": mask_files.overlay(image_hwc, nothing_hw, (), palette_vc)}  # enlarged as the others are
    if has_masks:
      labels_hw = label_maps.read(ws.folder("masks") / listed[row], np.arange(-1, len(ws.dataset.names)))
      seen["masks"] = mask_files.overlay(image_hwc, labels_hw, ws.dataset.names, palette_vc)
    if truth:
      shown_hw = np.maximum(truth[row], label_maps.BACKGROUND)  # what is not judged, too
      seen["true masks"] = mask_files.overlay(image_hwc, shown_hw, ws.dataset.names, palette_vc)
    yield row, seen
