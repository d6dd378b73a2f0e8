"""What every pixel of the test pictures truly shows, for those data sets that say so.

Shapes: n image, h w pixel.
"""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from digzsl_jax.data import coco_stuff, label_maps, multilabel_scenes, pictures, tagged_files, voc
from digzsl_jax.data.label_maps import BACKGROUND, NOT_JUDGED
from digzsl_jax.data.tagged import MultilabelDataset

# The column of each value of VOC's masks: 0 is background, 255 an outline or what is difficult.
_VOC_COLUMNS = np.full(256, label_maps.UNKNOWN)
_VOC_COLUMNS[:len(voc.NAMES) + 1] = np.arange(-1, len(voc.NAMES))
_VOC_COLUMNS[255] = NOT_JUDGED


@dataclasses.dataclass(frozen=True)
class TrueMasks:
  """`masks[n]` is `[h, w]`, int16, of the picture's own size: a pixel's label (column), or -1 or -2.

  -1, `BACKGROUND`: none of the labels. -2, `NOT_JUDGED`: VOC's outlines, COCO's crowds, what COCO-Stuff leaves
  unlabelled.

  Attributes:
    sources: what each mask is made of.
    read: makes it; raises ValueError for a damaged file.
    fingerprint: SHA-256 of it all.
  """

  sources: Sequence[Any]
  read: Callable[[Any], np.ndarray]
  fingerprint: bytes

  def __len__(self) -> int:
    return len(self.sources)

  def __getitem__(self, row: int) -> np.ndarray:
    return self.read(self.sources[row])


def open(section: Mapping, dataset: MultilabelDataset) -> TrueMasks | None:
  """The masks of `dataset.test`, picture by picture; None where the data set has no masks.

  Args:
    section: the fields by which `multilabel.load` made `dataset`.
    dataset: what it made. Pictures that were left out as damaged have no masks here either.

  Raises:
    ValueError: no mask for a picture, damaged masks or annotations, or COCO without `pycocotools`.
  """
  kind = _KINDS.get(section["name"])
  return kind and kind(section, dataset)


def _scenes(section: Mapping, dataset: MultilabelDataset) -> TrueMasks:
  arguments = {field: value for field, value in section.items() if field not in ("name", "train")}
  shown_nhw = multilabel_scenes.masks(**arguments).astype(np.int16)
  return TrueMasks(shown_nhw, lambda shown_hw: shown_hw, hashlib.sha256(shown_nhw).digest())


def _voc(section: Mapping, dataset: MultilabelDataset) -> TrueMasks:
  return _in_files(pathlib.Path(section["folder"]).expanduser() / "SegmentationClass", dataset, _VOC_COLUMNS,
                   'take the lists of images that have one: lists="Segmentation"')


def _coco_stuff(section: Mapping, dataset: MultilabelDataset) -> TrueMasks:
  return _in_files(coco_stuff.maps_folder(pathlib.Path(section["folder"]).expanduser()), dataset, coco_stuff.COLUMNS,
                   "unpack stuffthingmaps_trainval2017.zip again")


def _in_files(folder: pathlib.Path, dataset: MultilabelDataset, columns_v: np.ndarray, remedy: str) -> TrueMasks:
  """Masks in PNG files of `folder`, by the stems of the pictures' names."""
  names = [pathlib.PurePosixPath(file.path).stem + ".png" for file in dataset.test.images_nhwc.files]
  files, damaged = pictures.scan(folder, names)
  if damaged:
    listed = "; ".join(f"{folder / name} ({wrong})" for name, wrong in list(damaged.items())[:5])
    raise ValueError(f"{len(damaged)} masks of {len(names)} pictures cannot be read: {listed}. Get them again, or "
                     f"{remedy}")
  digest = hashlib.sha256(columns_v.tobytes())
  for name, content in files:
    digest.update(name.encode() + b"\0" + content)
  return TrueMasks([folder / name for name in names], lambda path: label_maps.read(path, columns_v), digest.digest())


def _coco(section: Mapping, dataset: MultilabelDataset) -> TrueMasks:
  """Masks out of the outlines of `instances_*.json`; the pictures' folder is named as the annotations are."""
  paths = [file.path for file in dataset.test.images_nhwc.files]
  part = pathlib.PurePosixPath(paths[0]).parts[0]
  path = pathlib.Path(section["folder"]).expanduser() / f"annotations/instances_{part}.json"
  tool = _pycocotools(path)
  found = tagged_files.read_json(path, "COCO's annotations", _packed)
  column_of = {name: column for column, name in enumerate(dataset.names)}
  try:
    columns = {one["id"]: column_of.get(one["name"], BACKGROUND) for one in found["categories"]}
    images = {f"{part}/{one['file_name']}": one for one in found["images"]}
    sizes = {one["id"]: (one["height"], one["width"]) for one in found["images"]}
    objects = collections.defaultdict(list)
    for one in found["annotations"]:
      objects[one["image_id"]].append((bool(one["iscrowd"]), one["area"], columns[one["category_id"]],
                                       one["segmentation"], one["id"]))
    sources = [(sizes[images[name]["id"]], objects[images[name]["id"]]) for name in paths]
  except (KeyError, TypeError) as error:
    raise ValueError(f"{path} has no outlines of objects: images with height and width, annotations with "
                     f"segmentation, area and iscrowd (not there: {error}); get it again") from error
  with path.open("rb") as file:
    content = hashlib.file_digest(file, "sha256").digest()
  digest = hashlib.sha256(repr((dataset.names, paths)).encode() + content).digest()
  return TrueMasks(sources, lambda source: _drawn(*source, tool, path), digest)


def _drawn(size: tuple[int, int], objects: Sequence[tuple], tool: ModuleType, path: pathlib.Path) -> np.ndarray:
  """Crowds first, then objects from the largest to the smallest, of equal ones in the file's order."""
  shown_hw = np.full(size, BACKGROUND, np.int16)
  for crowd, _, column, outline, number in sorted(objects, key=lambda one: (not one[0], -one[1])):
    try:
      inside_hw = _inside(outline, size, tool)
    except Exception as error:  # pycocotools raises whatever comes
      raise ValueError(f"{path}: the outline of annotation {number} cannot be drawn ({error}); get the file "
                       "again") from error
    shown_hw[inside_hw] = NOT_JUDGED if crowd and column != BACKGROUND else column
  return shown_hw


def _inside(outline: list[np.ndarray] | dict, size: tuple[int, int], tool: ModuleType) -> np.ndarray:
  """`[h, w]`, bool, of COCO's polygons or run lengths."""
  if isinstance(outline, dict):
    if tuple(outline["size"]) != size:
      raise ValueError(f"it is {outline['size']} in an image of {list(size)}")
    return tool.decode(tool.frPyObjects(outline, *size) if isinstance(outline["counts"], list) else outline) > 0
  # pycocotools takes four numbers for a box.
  if wrong := [polygon for polygon in outline if len(polygon) < 6 or len(polygon) % 2]:
    raise ValueError(f"a polygon has {len(wrong[0])} coordinates")
  return tool.decode(tool.merge(tool.frPyObjects(outline, *size))) > 0 if outline else np.zeros(size, bool)


def _packed(one: dict) -> dict:
  """Polygons as arrays, which take less memory than lists."""
  if isinstance(one.get("segmentation"), list):
    one["segmentation"] = [np.array(polygon, float) for polygon in one["segmentation"]]
  return one


def _pycocotools(path: pathlib.Path) -> ModuleType:
  try:
    from pycocotools import mask
  except ImportError as error:
    raise ValueError(f"the outlines of {path} are drawn with pycocotools, which is not installed: pip install "
                     "pycocotools") from error
  return mask


_KINDS = {"scenes": _scenes, "voc": _voc, "coco": _coco, "coco_stuff": _coco_stuff}
