"""MS-COCO (arXiv 1405.0312) as a multi-label data set, with the zero-shot splits of its 80 classes.

    annotations/instances_train2017.json  annotations/instances_val2017.json  train2017/*.jpg  val2017/*.jpg

and likewise for 2014.

Shapes: n image, k label.
"""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from digzsl_jax.data import benchmarks, tagged_files
from digzsl_jax.data.tagged import MultilabelDataset

# Unseen classes of the zero-shot splits, and the classes that a split does not use.
#
# 48/17: Bansal et al., "Zero-Shot Object Detection", ECCV 2018 (arXiv 1804.04340). The authors' lists are handed on by
# github.com/alirezazareian/ovr-cnn (mscoco_seen_classes.json, mscoco_unseen_classes.json);
# github.com/zhengye1995/Zero-shot-Instance-Segmentation (mmdet/datasets/coco_48_17.py) has the same classes.
# 65/15: Rahman et al., "Improved Visual-Semantic Alignment for Zero-Shot Object Detection", AAAI 2020 (arXiv
# 1811.08982). The authors' github.com/salman-h-khan/PL-ZSD_Release (MSCOCO/cls_names_seen_coco.csv and
# cls_names_test_coco.csv) and Zero-shot-Instance-Segmentation (mmdet/datasets/coco_unseen15.py) agree.
UNSEEN = {
  "48/17": ("airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard", "skateboard", "cup",
            "knife", "cake", "couch", "keyboard", "sink", "scissors"),
  "65/15": ("airplane", "train", "parking meter", "cat", "bear", "suitcase", "frisbee", "snowboard", "fork", "sandwich",
            "hot dog", "toilet", "mouse", "toaster", "hair drier"),
}
UNUSED = {
  "48/17": ("traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball", "baseball bat",
            "baseball glove", "tennis racket", "wine glass", "hot dog", "potted plant", "dining table", "cell phone",
            "teddy bear", "hair drier"),
  "65/15": (),
}


def load(*, folder: str, year: int = 2017, split: str = "", train: bool = True, size: int = 448,
         skip_damaged: bool = False) -> MultilabelDataset:
  """Training images of `train`, test images of `val`. Labels are in the order of category ids.

  Boxes of crowds count, as in ML-Decoder's published code. It leaves out images without any box, and so do TagCLIP's
  lists (40,137 images of val2014); here they stay (`multilabel.with_any`). Images that show unseen classes stay in
  training too; the authors of both splits leave them out.

  Args:
    folder: holds `annotations` and the folders of pictures.
    year: 2014 or 2017.
    split: "" for all 80 classes, all seen; "48/17" or "65/15" for seen and unseen ones. Classes outside the split are
      no labels.
    train: whether there are training images; TagCLIP needs none.
    size: height and width that pictures are squashed to.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: no such file, broken annotations, another year or split.
  """
  root = pathlib.Path(folder).expanduser()
  if year not in (2014, 2017):
    raise ValueError(f"year is {year}; COCO's instances are of 2014 and 2017")
  if split and split not in UNSEEN:
    raise ValueError(f'split is "{split}"; it must be one of {", ".join(UNSEEN)}, or empty')
  names, paths, targets_nk = read_instances(root / f"annotations/instances_val{year}.json")
  parts = {"train": ([], targets_nk[:0]), "test": ([f"val{year}/{path}" for path in paths], targets_nk)}
  if train:
    path = root / f"annotations/instances_train{year}.json"
    train_names, paths, targets_nk = read_instances(path)
    if train_names != names:
      raise ValueError(f"{path} has other categories than those of val{year}; get both from one release")
    parts["train"] = [f"train{year}/{path}" for path in paths], targets_nk
  unseen, unused = (UNSEEN[split], UNUSED[split]) if split else ((), ())
  if missing := [name for name in (*unseen, *unused) if name not in names]:
    raise ValueError(f"{root}: the annotations have no category {benchmarks.some(missing)}, but split {split} has; get "
                     "COCO's own files")
  used = [k for k, name in enumerate(names) if name not in unused]
  parts = {part: (paths, targets_nk[:, used]) for part, (paths, targets_nk) in parts.items()}
  name = f"coco{year}" + (f"-{split.replace('/', '-')}" if split else "")
  return tagged_files.dataset(name, [names[k] for k in used], unseen, root, parts, size, skip_damaged)


def read_instances(path: pathlib.Path) -> tuple[list[str], list[str], np.ndarray]:
  """Category names, picture files and targets `[n, k]` out of COCO's annotations, images and categories by id.

  Raises:
    ValueError: no such file, or one that is broken.
  """
  found = tagged_files.read_json(path, "COCO's annotations", _without_outline)
  try:
    categories, images = _by_id(path, found["categories"], "name"), _by_id(path, found["images"], "file_name")
    pairs = {(box["image_id"], box["category_id"]) for box in found["annotations"]}
  except (KeyError, TypeError) as error:
    raise ValueError(f"{path} has no COCO annotations: images with id and file_name, categories with id and name, "
                     f"annotations with image_id and category_id (not there: {error}); get it again") from error
  for what, place, known in (("image", 0, images), ("category", 1, categories)):
    if wrong := {pair[place] for pair in pairs} - known.keys():
      raise ValueError(f"{path}: an annotation is of {what} {min(wrong)}, which is not listed; get the file again")
  row, column = ({key: place for place, key in enumerate(known)} for known in (images, categories))
  targets_nk = np.zeros((len(images), len(categories)), np.int8)
  for image, category in pairs:
    targets_nk[row[image], column[category]] = 1
  return list(categories.values()), list(images.values()), targets_nk


def _without_outline(one: dict) -> dict:
  """Outlines are nearly all of the file: with them reading takes nearly three times the memory and twice the time."""
  one.pop("segmentation", None)
  return one


def _by_id(path: pathlib.Path, listed: list[Mapping[str, Any]], key: str) -> dict[int, str]:
  found = {one["id"]: one[key] for one in sorted(listed, key=lambda one: one["id"])}
  if not found:
    raise ValueError(f"{path} lists no {key}; get it again")
  if len(found) < len(listed):
    [(twice, _)] = collections.Counter(one["id"] for one in listed).most_common(1)
    raise ValueError(f"{path}: id {twice} ({found[twice]}) is listed more than once; get the file again")
  return found
