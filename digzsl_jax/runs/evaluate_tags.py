"""Measures the tags and masks of TagCLIP and writes `results.json`; in the file all is in percent.

Every stage of the method is measured alike: the whole picture alone (CLIP's own answer), best patch, refined patches,
second look. Average precision is `multilabel_metrics.py`'s; precision, recall and F1 are those of all tags together,
which `tagclip.tags` decides.

Masks are compared pixel by pixel with the true ones, over all pictures: the intersection over union of each class.
Beside them stand two trivial ways: to call everything background, and to call every pixel of a picture its best tag.

Shapes: n test picture, f label, h w pixel, c class of a pixel.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from digzsl_jax import files, logs, multilabel_metrics, segmentation_metrics
from digzsl_jax.base_workspace import check
from digzsl_jax.data import label_lists, label_maps, true_masks
from digzsl_jax.models import tagclip
from digzsl_jax.multilabel_metrics import percent
from digzsl_jax.tag_workspace import TagWorkspace

NEEDS = ("tags",)
IF_THERE = ("masks",)
MODELS = ()
OURS, METHODS = "tagclip", ("global", "patch", "dmar", "tagclip")
GROUPS = {"": None, "stuff27": (label_lists.STUFF27_NAMES, label_lists.STUFF27)}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is counted.

  Attributes:
    difficult: whether a label that was not judged, as VOC's difficult objects, is present, as in TagCLIP's lists; else
      the picture is left out for that label, as the development kit does.
    drop_empty: leaves out pictures without a label, as TagCLIP's lists do.
    skip_absent: leaves labels without a picture out of mAP; else they count 0, as published.
    groups: "stuff27" for the 27 groups of COCO-Stuff in place of its 171 labels in masks; "" for labels as they are.
    background: whether what is no label is a class of masks, as for VOC and COCO; else it is not judged.
  """

  difficult: bool
  drop_empty: bool
  skip_absent: bool
  groups: str
  background: bool

  def __post_init__(self):
    check(self.groups in GROUPS, "groups", self.groups, f"one of {list(GROUPS)}")


def validate(settings: Settings, ws: TagWorkspace) -> None:
  """Raises ValueError if no picture holds a label, or groups do not fit the labels."""
  if not (targets(settings, ws) == 1).any():
    raise ValueError(f"no test picture of {ws.dataset.name} holds a label, so nothing can be ranked right; leave this "
                     "stage out, or give config.data pictures that do")
  if settings.groups and len(GROUPS[settings.groups][1]) != len(ws.dataset.names):
    raise ValueError(f"groups is {settings.groups!r}, which groups {len(GROUPS[settings.groups][1])} labels, but "
                     f"{ws.dataset.name} has {len(ws.dataset.names)}; set it to ''")


def targets(settings: Settings, ws: TagWorkspace) -> np.ndarray:
  """`[n, f]` as they are counted."""
  targets_nf = ws.dataset.test.targets_nk
  return np.abs(targets_nf) if settings.difficult else targets_nf


def measure(settings: Settings, scores_nf: np.ndarray, targets_nf: np.ndarray, names: Sequence[str],
            threshold: float) -> dict:
  """What `results.json` says of the scores of one stage of the method."""
  if settings.drop_empty:
    rows = (targets_nf == 1).any(1)
    scores_nf, targets_nf = scores_nf[rows], targets_nf[rows]
  tags_nf = np.asarray(tagclip.tags(jnp.asarray(scores_nf), threshold))
  precisions_f = multilabel_metrics.average_precisions(scores_nf, targets_nf)
  counted = multilabel_metrics.tags_precision_recall_f1(tags_nf, targets_nf)
  return {"mAP": percent(multilabel_metrics.mean_average_precision(precisions_f, skip_absent=settings.skip_absent)),
          "F1": percent(counted.f1), "P": percent(counted.precision), "R": percent(counted.recall),
          "tags_per_picture": round(float(tags_nf.sum(1).mean()), 2), "pictures": len(scores_nf),
          "per_label": {name: percent(precision) for name, precision in zip(names, precisions_f)}}


def measure_masks(settings: Settings, ws: TagWorkspace, scores_nf: np.ndarray) -> dict[str, dict] | None:
  """mIoU and IoU by class of the masks and of the trivial ways; None where there are no masks, or no true ones."""
  folder = ws.folder("masks")
  truth = true_masks.open(ws.config["data"], ws.dataset)
  if truth is None:
    return None
  names, column_f = GROUPS[settings.groups] or (ws.dataset.names, range(len(ws.dataset.names)))
  # Negative truth: -1 background, -2 not judged. A class of its own comes first if background is one.
  first = int(settings.background)
  class_v = np.array([*(first + column for column in column_f), -1, first - 1])  # -1 picks the last: background
  names = [*(["background"] if first else []), *names]
  found = {way: np.zeros((len(names),) * 2, np.int64) for way in ("masks", "best_tag", "all_background")[:2 + first]}
  best_n = scores_nf.argmax(1)
  with ws.log.progress(len(truth), "comparing masks") as bar:
    for row, labels_hw in enumerate(predicted(folder, len(ws.dataset.names))):
      true_hw = class_v[truth[row]]
      for way, answer_hw in (("masks", class_v[labels_hw]), ("best_tag", np.full_like(true_hw, class_v[best_n[row]])),
                             ("all_background", np.zeros_like(true_hw))):
        if way in found:
          found[way] += segmentation_metrics.confusion(answer_hw, true_hw, len(names))
      bar.update()
  measured = {}
  for way, confusion_cc in found.items():
    mean, iou_c = segmentation_metrics.mean_iou(confusion_cc)
    measured[way] = {"mIoU": percent(mean), "per_class": dict(zip(names, map(percent, iou_c)))}
  return measured


def predicted(folder: pathlib.Path, labels: int) -> Iterator[np.ndarray]:
  """The label maps that stage masks left, -1 for background."""
  listed = files.read_json(folder / "manifest.json")["masks"]
  column_v = np.arange(-1, labels)  # 0 is background
  for path in listed:
    yield label_maps.read(folder / path, column_v)


def complete(ws: TagWorkspace, folder: pathlib.Path) -> bool:
  """Whether `results.json` is there; it lies outside the stage's folder."""
  return (ws.workdir / "results.json").exists()


def run(settings: Settings, ws: TagWorkspace, folder: pathlib.Path) -> dict:
  """Writes `results.json` in the work folder; returns its headline numbers."""
  scores = ws.scores()
  targets_nf, threshold = targets(settings, ws), ws.config["tags"]["threshold"]
  measured = {name: measure(settings, scores[name], targets_nf, ws.dataset.names, threshold) for name in METHODS}
  results = measured.pop(OURS) | {
      "method": OURS, "dataset": ws.dataset.name, "seed": ws.seed, "labels": len(ws.dataset.names),
      "background": list(ws.background), "baselines": measured, "warnings": ws.warnings,
      "tagging": ws.stages["tags"].results(), "devices": logs.devices(ws.mesh.devices.flat),
      "seconds": {name: stage.results()["seconds"] for name, stage in ws.stages.items() if stage.done}}
  if ws.stages["masks"].done and (masks := measure_masks(settings, ws, scores[OURS])):
    results |= {"mIoU": masks["masks"]["mIoU"], "masks": masks}
  files.write_json(ws.workdir / "results.json", results)
  headline = {name: results[name] for name in ("mAP", "F1", "mIoU") if name in results}
  ws.log.say(f"evaluate: {headline}")
  return headline
