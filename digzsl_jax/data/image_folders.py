"""Which images the data sets AWA2, CUB, FLO and SUN hold, and of which class, as their authors lay them out.

A benchmark's folder is the data set's own one, or holds it under its usual name:

    AWA2  [Animals_with_Attributes2/]  JPEGImages/CLASS/*.jpg
    CUB   [CUB_200_2011/]  images/NNN.CLASS/*.jpg; if there: images.txt, image_class_labels.txt, classes.txt
    FLO   [flowers-102/]  jpg/image_NNNNN.jpg, imagelabels.mat, setid.mat
    SUN   [SUNAttributeDB_Images/]  images/LETTER/CLASS[/CLASS]/*.jpg; if there: [SUNAttributeDB/] images.mat

Classes go by name: a folder's number means nothing to the Proposed Splits.

Shapes: n image, k class, a attribute.
"""

import pathlib
import re
from typing import NamedTuple

import numpy as np

from digzsl_jax.data import benchmarks, matlab

_USUAL = {"AWA2": ("Animals_with_Attributes2",), "CUB": ("CUB_200_2011",), "FLO": ("flowers-102",),
          "SUN": ("SUNAttributeDB_Images", "SUNAttributeDB")}
_PICTURES = {"AWA2": "JPEGImages", "CUB": "images", "FLO": "jpg", "SUN": "images"}


class Images(NamedTuple):
  """Images in the order of the Proposed Splits or of the data set."""
  paths_n: tuple[str, ...]  # relative to the benchmark's folder
  classes_n: tuple[str, ...]  # raw class names


def read(name: str, folder: pathlib.Path) -> Images | None:
  """The images of benchmark `name` in `folder`, in the data set's order; None where it is not laid out as above.

  FLO's order is that of `setid.mat`: the parts trnid, valid and tstid one after the other.

  Raises:
    ValueError: files that are damaged or contradict each other, or classes that the benchmark does not have.
  """
  readers = {"CUB": _read_cub, "FLO": _read_flo, "SUN": _read_sun}
  found = readers[name](folder) if name in readers else _read_folders(name, folder)
  if found is not None:
    class_by_key = {_key(raw): raw for raw in benchmarks.published_classes(name)}
    strange = sorted({raw for raw in found.classes_n if _key(raw) not in class_by_key})
    if strange:
      raise ValueError(f"{folder}: {name} has no class {benchmarks.some(strange)}; name the folder of {name}'s images "
                       "and take out what is not of the data set")
    found = found._replace(classes_n=tuple(class_by_key[_key(raw)] for raw in found.classes_n))
  return found


def adopt(name: str, folder: pathlib.Path, path: str) -> str:
  """An image's path on another machine as one relative to the benchmark's folder.

  What comes after the data set's image folder stays. That is what published loaders keep too, who cut a number of
  parts off the front: AWA2 5, CUB 6, SUN 7, FLO all but two.

  Raises:
    ValueError: the path goes through no such folder.
  """
  head, found, tail = path.rpartition(f"/{_PICTURES[name]}/")
  if not found:
    raise ValueError(f'image file "{path}" is in no folder {_PICTURES[name]}/, where {name} has its images')
  return f"{_pictures(name, folder)}/{tail}"


def same_class(name: str, path: str, raw: str) -> bool:
  """Whether an image is in the folder of class `raw`; yes for FLO, whose images are all in one folder."""
  below = path.rpartition(f"{_PICTURES[name]}/")[2].split("/")[:-1]
  return name == "FLO" or _key("".join(below[1:] if name == "SUN" else below)) == _key(raw)


def attributes(name: str, folder: pathlib.Path, raw_names_k: tuple[str, ...]) -> np.ndarray | None:
  """The data set's own continuous class attributes `[k, a]` at unit length, where AWA2 or CUB has them."""
  file = {"AWA2": "predicate-matrix-continuous.txt",
          "CUB": "attributes/class_attribute_labels_continuous.txt"}.get(name)
  values_path = file and _find(name, folder, file)
  names_path = _find(name, folder, "classes.txt")
  if not values_path or not names_path:
    return None
  order = [line.split()[-1] for line in lines(names_path)]
  try:
    values_ka = np.loadtxt(values_path, ndmin=2)
    values_ka = values_ka[[order.index(raw) for raw in raw_names_k]]
  except (ValueError, IndexError) as error:
    raise ValueError(f"{values_path} and {names_path} do not give attributes of every class ({error}); get both "
                     "again") from error
  return values_ka / np.linalg.norm(values_ka, axis=1, keepdims=True)


def lines(path: pathlib.Path) -> list[str] | None:
  """The lines of a text file that are not empty; None where there is no file.

  Raises:
    ValueError: it is no text file.
  """
  if not path.is_file():
    return None
  try:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is no text file ({error}); get it again") from error


def _read_folders(name: str, folder: pathlib.Path) -> Images | None:
  """A folder for each class."""
  paths = sorted(path.relative_to(folder).as_posix() for path in (folder / _pictures(name, folder)).glob("*/*.jpg"))
  return Images(tuple(paths), tuple(path.split("/")[-2] for path in paths)) if paths else None


def _read_cub(folder: pathlib.Path) -> Images | None:
  listed, pictures = _find("CUB", folder, "images.txt"), _pictures("CUB", folder)
  if listed is None:
    return _read_folders("CUB", folder)
  tables = [_table(listed.with_name(file)) for file in ("images.txt", "image_class_labels.txt", "classes.txt")]
  path_of, number_of, name_of = tables
  if set(path_of) != set(number_of) or not set(number_of.values()) <= set(name_of):
    raise ValueError(f"{listed} has {len(path_of)} images, image_class_labels.txt {len(number_of)}, of classes that "
                     "classes.txt must name; get the three files again")
  classes = tuple(name_of[number_of[image]] for image in path_of)
  for path, raw in zip(path_of.values(), classes):
    if path.split("/")[0] != raw:
      raise ValueError(f"{listed}: {path} is labelled {raw}; get images.txt, image_class_labels.txt and classes.txt "
                       "again")
  return Images(tuple(f"{pictures}/{path}" for path in path_of.values()), classes)


def _read_flo(folder: pathlib.Path) -> Images | None:
  paths = [_find("FLO", folder, file) for file in ("imagelabels.mat", "setid.mat")]
  if None in paths:
    return None
  labels_path, parts_path = paths
  labels, parts = matlab.read(labels_path, ["labels"]), matlab.read(parts_path, ["trnid", "valid", "tstid"])
  if not labels or len(parts) < 3:
    raise ValueError(f"{labels_path} must hold labels, and {parts_path} trnid, valid and tstid; get them again")
  numbers_n = labels["labels"].ravel().astype(int)
  images_n = np.concatenate([parts[part].ravel() for part in ("trnid", "valid", "tstid")]).astype(int)
  if not np.array_equal(np.sort(images_n), np.arange(1, len(numbers_n) + 1)):
    raise ValueError(f"{parts_path} must name each of the {len(numbers_n)} images of {labels_path} once, counted "
                     "from 1; get both again")
  raw_names = tuple(benchmarks.published_classes("FLO"))
  if not 1 <= numbers_n.min() <= numbers_n.max() <= len(raw_names):
    raise ValueError(f"{labels_path}: labels go from {numbers_n.min()} to {numbers_n.max()}, but Oxford's from 1 to "
                     f"{len(raw_names)}; get the file again")
  pictures = _pictures("FLO", folder)
  return Images(tuple(f"{pictures}/image_{image:05d}.jpg" for image in images_n),
                tuple(raw_names[numbers_n[image - 1] - 1] for image in images_n))


def _read_sun(folder: pathlib.Path) -> Images | None:
  pictures, listed = _pictures("SUN", folder), _find("SUN", folder, "images.mat")
  if listed:
    found = matlab.read(listed, ["images"]).get("images")
    if not isinstance(found, list):
      raise ValueError(f"{listed} must hold the image files as `images`; get it again")
    paths = [f"{pictures}/{path}" for path in found]
  else:
    paths = sorted(path.relative_to(folder).as_posix() for path in (folder / pictures).glob("?/*/**/*.jpg"))
  if not paths:
    return None
  prefix = len(pictures.split("/")) + 1  # and the letter
  return Images(tuple(paths), tuple("_".join(path.split("/")[prefix:-1]) for path in paths))


def _find(name: str, folder: pathlib.Path, file: str) -> pathlib.Path | None:
  places = (folder, *(folder / usual for usual in _USUAL[name]))
  return next((place / file for place in places if (place / file).exists()), None)


def _pictures(name: str, folder: pathlib.Path) -> str:
  """The folder of images, relative to `folder`; where there is none, the one that should be there."""
  found = _find(name, folder, _PICTURES[name])
  if found is None:
    usual = next((folder / place for place in _USUAL[name] if (folder / place).is_dir()), folder)
    found = usual / _PICTURES[name]
  return found.relative_to(folder).as_posix()


def _key(raw: str) -> str:
  """A class name as far as all its spellings agree: "athletic_field/outdoor" and "athletic_field_outdoor"."""
  return re.sub(r"[^a-z0-9]", "", raw.lower())


def _table(path: pathlib.Path) -> dict[str, str]:
  """A file of lines "number value"."""
  found = lines(path)
  if found is None:
    raise ValueError(f"{path} is missing; get the data set's text files again")
  rows = [line.split(maxsplit=1) for line in found]
  if any(len(row) < 2 for row in rows) or len({row[0] for row in rows}) < len(rows):
    raise ValueError(f"{path} must hold lines of a number and a value, each number once; get it again")
  return dict(rows)
