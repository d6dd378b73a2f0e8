"""PASCAL VOC 2007 to 2012 as a multi-label data set.

    [VOCdevkit/VOC2007/]  Annotations/*.xml, ImageSets/Main/*.txt, JPEGImages/*.jpg

and for segmentation `ImageSets/Segmentation/*.txt` and `SegmentationClass/*.png`.

Shapes: n image, k label.
"""

import pathlib
from xml.etree import ElementTree

import numpy as np

from digzsl_jax.data import tagged_files
from digzsl_jax.data.tagged import MultilabelDataset

NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
         "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
LISTS = ("Main", "Segmentation")


def load(*, folder: str, train: str = "trainval", test: str = "test", lists: str = "Main", unseen: str = "",
         size: int = 448, skip_damaged: bool = False) -> MultilabelDataset:
  """The 20 classes by the objects of an image; one whose objects are all "difficult" is not judged there: -1.

  The development kit leaves those out of average precision; TagCLIP's lists take them for present.

  Args:
    folder: of one year, as `VOCdevkit/VOC2007`.
    train: a list of `ImageSets/<lists>` without its suffix; "" for no training images.
    test: another. The kit of 2012 has no annotations of its test images: take "val", and "train" for `train`.
    lists: "Main", or "Segmentation" for the images that have masks: of 2012, "val" is 1,449 of them.
    unseen: text file with the name of an unseen class on each line, relative to `folder`; "" where all are seen.
    size: height and width that pictures are squashed to.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: no such file, a broken annotation, or one of another class; another word for `lists`.
  """
  if lists not in LISTS:
    raise ValueError(f'lists is "{lists}"; it must be {" or ".join(LISTS)}, a folder of ImageSets')
  root = pathlib.Path(folder).expanduser()
  hidden = unseen and tagged_files.read_names(root / unseen, "the names of the unseen classes", NAMES)
  parts = {}
  for part, name in (("train", train), ("test", test)):
    ids = read_set(root / f"ImageSets/{lists}/{name}.txt") if name else []
    targets_nk = np.zeros((len(ids), len(NAMES)), np.int8)
    for row, image in enumerate(ids):
      targets_nk[row] = read_annotation(root / f"Annotations/{image}.xml")
    parts[part] = [f"JPEGImages/{image}.jpg" for image in ids], targets_nk
  return tagged_files.dataset(root.resolve().name.lower(), NAMES, hidden, root, parts, size, skip_damaged)


def read_annotation(path: pathlib.Path) -> np.ndarray:
  """Targets `[k]` of one image.

  Raises:
    ValueError: the file is missing or broken, or has an object of another class.
  """
  targets_k = np.zeros(len(NAMES), np.int8)
  try:
    objects = ElementTree.parse(path).getroot().findall("object")
  except FileNotFoundError as error:
    raise ValueError(f"there is no annotation {path}; get it again, or take the image off the list") from error
  except ElementTree.ParseError as error:
    raise ValueError(f"{path} is no XML ({error}); get it again") from error
  for found in objects:
    name = (found.findtext("name") or "").strip()
    if name not in NAMES:
      raise ValueError(f"{path}: an object is of class {name!r}, which is none of VOC's 20; get the file again")
    k, difficult = NAMES.index(name), (found.findtext("difficult") or "0").strip() == "1"
    targets_k[k] = (targets_k[k] or -1) if difficult else 1
  return targets_k


def read_set(path: pathlib.Path) -> list[str]:
  """Image ids, the first word of each line.

  Raises:
    ValueError: no such file, an empty one, or an id that repeats.
  """
  ids = [line.split()[0] for line in tagged_files.read_lines(path, "the images of a set")]
  tagged_files.check_once(path, ids)
  return ids
