"""COCO-Stuff (arXiv 1612.03716) of 2017 as a multi-label data set: 171 labels, 80 things and 91 kinds of stuff.

    stuffthingmaps/val2017/*.png  val2017/*.jpg

`stuffthingmaps_trainval2017.zip` unpacks to `val2017` and `train2017`: do that in a folder `stuffthingmaps`, beside the
pictures' own or in `annotations`.

Shapes: n image, h w pixel, k label, v value of a file.
"""

import pathlib

import numpy as np

from digzsl_jax.data import label_lists, label_maps, pictures, tagged_files, voc
from digzsl_jax.data.tagged import MultilabelDataset

FOLDERS = ("stuffthingmaps/val2017", "annotations/stuffthingmaps/val2017")
# The column of each value of a map: values are ids less one, 255 is unlabelled.
COLUMNS = np.full(256, label_maps.UNKNOWN)
COLUMNS[[i - 1 for i in range(1, 183) if i not in label_lists.STUFF_UNUSED_IDS]] = np.arange(171)
COLUMNS[255] = label_maps.NOT_JUDGED


def load(*, folder: str, list: str = "", size: int = 448, skip_damaged: bool = False) -> MultilabelDataset:
  """Test images of `val2017`; an image's labels are those of its pixels. There are no training images.

  Labels are in the order of ids, by the names that `label_lists` has.

  Args:
    folder: holds `stuffthingmaps` and `val2017`.
    list: text file, relative to `folder`, with an image id as the first word of each line, as TagCLIP's lists of 4,172
      images; what follows is not read. "" for every image that has a map: 5,000.
    size: height and width that pictures are squashed to.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: no such file, no maps, a damaged map or one of other values.
  """
  root = pathlib.Path(folder).expanduser()
  maps = maps_folder(root)
  if list:
    ids = voc.read_set(root / list)
  elif not (ids := sorted(path.stem for path in maps.glob("*.png"))):
    raise ValueError(f"{maps} holds no maps (*.png); unpack stuffthingmaps_trainval2017.zip there")
  names = label_lists.LISTS["coco_stuff"].names
  targets_nk = np.zeros((len(ids), len(names)), np.int8)

  def fill(row: int) -> None:
    columns_hw = label_maps.read(maps / f"{ids[row]}.png", COLUMNS)
    targets_nk[row] = np.bincount(columns_hw[columns_hw >= 0], minlength=len(names)) > 0

  pictures.in_threads(fill, range(len(ids)), "reading maps of labels")
  parts = {"train": ([], targets_nk[:0]), "test": ([f"val2017/{name}.jpg" for name in ids], targets_nk)}
  return tagged_files.dataset("coco-stuff", names, (), root, parts, size, skip_damaged)


def maps_folder(root: pathlib.Path) -> pathlib.Path:
  """The first of `FOLDERS` that is there.

  Raises:
    ValueError: there is none.
  """
  for folder in FOLDERS:
    if (root / folder).is_dir():
      return root / folder
  raise ValueError(f"there is no folder {root / FOLDERS[0]}; unpack stuffthingmaps_trainval2017.zip in "
                   f"{(root / FOLDERS[0]).parent}")
