"""Reads the benchmarks AWA2, CUB, FLO and SUN from a folder of theirs, and checks them.

`python -m digzsl_jax.data.archives --check FOLDER` compares what is there with what is published. FOLDER holds
AWA2/, CUB/, FLO/ and SUN/, or some of them, or is one of them. Read there is

- the archive of the Proposed Splits (Xian et al. 2018, arXiv 1707.00600), release 1.0 or 2.0, .mat files of version
  5 or 7.3: att_splits.mat; res101.mat for labels and image files; allclasses.txt, trainvalclasses.txt,
  testclasses.txt, valclasses{1,2,3}.txt;
- the data set as its authors lay it out (see `image_folders`), beside the archive or alone.

Shapes: n image, k class, a attribute.
"""

import argparse
import os
import pathlib
import sys

import numpy as np

from digzsl_jax.data import benchmarks, image_folders, matlab
from digzsl_jax.data.benchmarks import LOCS, PUBLISHED, Split

_HELD_OUT = 5  # one of so many images of a seen class, in our own division


def load(folder: os.PathLike, name: str | None = None, *, validation: int = 1, seed: int = 0,
         images: image_folders.Images | None = None) -> Split:
  """The split of a benchmark.

  Rows and labels come from `att_splits.mat` and `res101.mat`, for FLO from `att_splits.mat` and Oxford's own files.
  `att_splits.mat` alone gives rows without labels and paths. Images without `res101.mat`, which says what image a row
  is, are divided: the published classes are unseen, and of each seen class a fifth, drawn by `seed`, is for
  `test_seen_loc`; there may be fewer classes than published.

  Args:
    folder: the benchmark's.
    name: "AWA2", "CUB", "FLO" or "SUN"; None for the folder's own name.
    validation: 1, 2 or 3, the published division of seen classes into training and validation.
    seed: of our own division.
    images: those of the data set, where it is not in the folder.

  Raises:
    ValueError: there is no benchmark, or its files are damaged, contradict each other or count from 0.
    OSError: a file cannot be read.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"there is no folder {folder}")
  name = name or folder.resolve().name.upper()
  if name not in PUBLISHED:
    raise ValueError(f'{folder}: "{name}" is no benchmark; give the name of one, {", ".join(PUBLISHED)}')
  if validation not in (1, 2, 3):
    raise ValueError(f"validation is {validation}: the published divisions are 1, 2 and 3")
  validation = int(validation)  # a config may have it as 1.0
  images, has_rows = images or image_folders.read(name, folder), (folder / "att_splits.mat").is_file()
  if has_rows and (name == "FLO" or not images or (folder / "res101.mat").is_file()):
    return _read_archive(name, folder, images, validation)
  if images:
    return _divide(name, folder, images, validation, seed)
  raise ValueError(f"{folder} holds neither att_splits.mat of the Proposed Splits nor the images of {name} as their "
                   "authors lay them out")


def _read_archive(name: str, folder: pathlib.Path, images: image_folders.Images | None, validation: int) -> Split:
  fields = ["allclasses_names", "att", *LOCS, "train_loc", "val_loc"]
  found = matlab.read(folder / "att_splits.mat", fields)
  check_numbers(folder / "att_splits.mat", found)
  raw_names_k = _names(name, folder, found)
  labels_n, paths_n = _labels(name, folder, raw_names_k, images)
  locs = rows(folder / "att_splits.mat", {field: found[field] for field in fields if field.endswith("_loc")
                                          and field in found})
  # The published ones of release 1.0 hold all of test_seen_loc; release 2.0 has none.
  for field in {"train_loc", "val_loc"} & set(locs):
    locs[field] = np.intersect1d(locs[field], locs["trainval_loc"])
  return Split(name=name, raw_names_k=raw_names_k, **_class_lists(name, folder, raw_names_k, validation), **locs,
               labels_n=labels_n, paths_n=paths_n,
               attributes_ka=attributes(folder / "att_splits.mat", found, len(raw_names_k)))


def check_numbers(path: pathlib.Path, found: dict) -> None:
  """Raises ValueError if a list of rows is missing among the variables of an `att_splits.mat`."""
  if missing := [field for field in LOCS if not isinstance(found.get(field), np.ndarray)]:
    raise ValueError(f"{path} has no numbers {', '.join(missing)}; get it again")


def attributes(path: pathlib.Path, found: dict, classes: int) -> np.ndarray | None:
  """`att` of an `att_splits.mat` as `[k, a]`, None without it; raises ValueError if its columns are not the classes."""
  if (att := found.get("att")) is None:
    return None
  if np.shape(att)[1:] != (classes,):
    raise ValueError(f"{path}: att is {list(np.shape(att))}, but must have a column for each of {classes} classes")
  return att.T.astype(np.float64)


def _names(name: str, folder: pathlib.Path, found: dict) -> tuple[str, ...]:
  """Class names in the order of labels: allclasses.txt, which allclasses_names must equal, or either of them."""
  listed, stored = image_folders.lines(folder / "allclasses.txt"), found.get("allclasses_names")
  if listed and stored and listed != stored:
    wrong = sorted(set(listed) ^ set(stored))
    raise ValueError(f"{folder}: allclasses.txt and the allclasses_names of att_splits.mat differ: "
                     f"{benchmarks.some(wrong) if wrong else 'their orders'}; get both from one release")
  # FLO's archive has no names at all: its columns and labels are in Oxford's order.
  names = listed or stored or list(benchmarks.published_classes(name))
  if len(set(names)) < len(names):
    raise ValueError(f"{folder}: allclasses.txt repeats a class; get it again")
  return tuple(names)


def _class_lists(name: str, folder: pathlib.Path, raw_names_k: tuple[str, ...], validation: int) -> dict:
  """Labels of the seen, unseen and validation classes; where a file is absent, of the published lists."""
  published = benchmarks.published_classes(name)
  files = {"seen": "trainvalclasses.txt", "unseen": "testclasses.txt", "validation": f"valclasses{validation}.txt"}
  parts = {"seen": ("train", "validation"), "unseen": ("unseen",), "validation": ("validation",)}
  lists = {}
  for field, file in files.items():
    names = image_folders.lines(folder / file)
    if names is None:
      if field == "validation" and validation != 1:
        raise ValueError(f"{folder / file} is missing; only division 1 is known without it")
      names = [raw for raw in raw_names_k if published.get(raw) in parts[field]]
    strange = [raw for raw in names if raw not in raw_names_k]
    if strange:
      raise ValueError(f"{folder / file}: {benchmarks.some(strange)} not among all classes; get the class lists again")
    lists[field] = tuple(sorted(raw_names_k.index(raw) for raw in names))
  return lists


def _labels(name: str, folder: pathlib.Path, raw_names_k: tuple[str, ...], images: image_folders.Images | None):
  """`(labels_n, paths_n)` of res101.mat, each path being one of `images`; without the file those of `images`."""
  path = folder / "res101.mat"
  if not path.is_file():
    return (None, None) if images is None else (_positions(raw_names_k, images), images.paths_n)
  found = matlab.read(path, ["labels", "image_files"])  # the features are large, and of no use here
  if not isinstance(found.get("labels"), np.ndarray) or not isinstance(found.get("image_files", []), list):
    raise ValueError(f"{path} must hold labels, and image_files as text; get it again")
  labels_n = found["labels"].ravel().astype(np.int32) - 1
  if labels_n.min(initial=0) < 0:
    raise ValueError(f"{path}: labels count from 0, but must count from 1, the first row of allclasses.txt; get the "
                     "file again")
  if labels_n.max(initial=0) >= len(raw_names_k):
    raise ValueError(f"{path}: label {labels_n.max() + 1} is none of {len(raw_names_k)} classes; get the file again")
  if "image_files" not in found:
    return labels_n, None
  paths_n = tuple(image_folders.adopt(name, folder, file) for file in found["image_files"])
  if len(paths_n) != len(labels_n):
    raise ValueError(f"{path} has {len(paths_n)} image files, but {len(labels_n)} labels; get it again")
  class_of = dict(zip(images.paths_n, images.classes_n)) if images else None
  for file, label in zip(paths_n, labels_n.tolist()):
    raw = raw_names_k[label]
    if class_of and file not in class_of:
      raise ValueError(f"{folder}: {file} of res101.mat is not there; unpack or prepare the data set again")
    if not (class_of[file] == raw if class_of else image_folders.same_class(name, file, raw)):
      raise ValueError(f"{path}: {file} is labelled {raw}; labels are rows of allclasses.txt, not the numbers of "
                       "folders, so get both files from one release")
  return labels_n, paths_n


def rows(path: pathlib.Path, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Ascending rows from 0 of lists that count from 1."""
  if any((numbers < 1).any() for numbers in found.values()):
    raise ValueError(f"{path}: images are counted from 0, but must be counted from 1, as MATLAB does: every row would "
                     "be its neighbour; get the published file")
  ascending = {field: np.sort(numbers.ravel().astype(np.int64)) - 1 for field, numbers in found.items()}
  for field, rows_r in ascending.items():
    if not len(rows_r) or (np.diff(rows_r) == 0).any():
      raise ValueError(f"{path}: {field} is empty or repeats an image; get the file again")
  return ascending


def _divide(name: str, folder: pathlib.Path, images: image_folders.Images, validation: int, seed: int) -> Split:
  """Our own division, for images without the archive's rows."""
  present = set(images.classes_n)
  raw_names_k = tuple(raw for raw in benchmarks.published_classes(name) if raw in present)
  labels_n = _positions(raw_names_k, images)
  # The lists may be longer than the classes that are there.
  everything = tuple(benchmarks.published_classes(name))
  lists = {field: tuple(raw_names_k.index(everything[k]) for k in labels if everything[k] in present)
           for field, labels in _class_lists(name, folder, everything, validation).items()}
  rng = np.random.default_rng(seed)
  trainval, test_seen = [], []
  for label in lists["seen"]:
    rows_r = np.flatnonzero(labels_n == label)
    if len(rows_r) < 2:
      raise ValueError(f"{folder}: {raw_names_k[label]} has one image; a seen class needs two, to train and to test")
    held_out = max(1, round(len(rows_r) / _HELD_OUT))
    shuffled_r = rng.permutation(rows_r)
    test_seen.append(shuffled_r[:held_out])
    trainval.append(shuffled_r[held_out:])
  if not lists["seen"] or not lists["unseen"]:
    raise ValueError(f"{folder} holds no {'unseen' if lists['seen'] else 'seen'} class of {name}")
  return Split(name=name, raw_names_k=raw_names_k, **lists, trainval_loc=np.sort(np.concatenate(trainval)),
               test_seen_loc=np.sort(np.concatenate(test_seen)),
               test_unseen_loc=np.flatnonzero(np.isin(labels_n, lists["unseen"])),
               labels_n=labels_n, paths_n=images.paths_n, seed=seed,
               attributes_ka=image_folders.attributes(name, folder, raw_names_k))


def _positions(raw_names_k: tuple[str, ...], images: image_folders.Images) -> np.ndarray:
  position = {raw: label for label, raw in enumerate(raw_names_k)}
  return np.array([position[raw] for raw in images.classes_n], np.int32)


def check(folder: os.PathLike, name: str | None = None) -> bool:
  """Prints what is in a benchmark's folder beside what is published; whether they agree.

  Published are the rows of release 1.0. Those of another release (`benchmarks.other_release`) agree if every image is
  in a list that its class belongs to, and the classes are as published.

  Raises:
    ValueError, OSError: as `load`.
  """
  split = load(folder, name)
  print(benchmarks.summary(split))
  wanted, wrong = PUBLISHED[split.name], benchmarks.differences(split)
  other = benchmarks.other_release(split)
  free = "divided here" if split.seed is not None else "not release 1.0" if other else None
  for key, number in benchmarks.counts(split).items():
    mark = free if free and key in ("trainval", "test_seen") else "ok" if number == wanted[key] else "DIFFERS"
    print(f"  {key:<12}{number:>7}  published {wanted[key]:>6}  {mark}")
  print("  lists of classes and of rows are disjoint")  # or `Split` would have refused them
  for what, found in (("labels", split.labels_n), ("image files", split.paths_n), ("attributes", split.attributes_ka)):
    print(f"  {what}: {'none' if found is None else len(found)}")
  if other:
    print("  rows: not release 1.0 (other images, no train_loc, no val_loc); the counts of 2.0 are not known here")
  for line in wrong:
    print(f"  DIFFERS  {line}")
  print(f"  fingerprint {benchmarks.fingerprint(split)}")
  return not wrong


def main(arguments: list[str] | None = None) -> None:
  """The command line; the exit status is 1 if anything is wrong or not as published."""
  parser = argparse.ArgumentParser(prog="python -m digzsl_jax.data.archives",
                                   description="Compares zero-shot benchmarks with what is published.")
  parser.add_argument("--check", metavar="FOLDER", required=True,
                      help=f"folder of {', '.join(PUBLISHED)}, or of one of them")
  parser.add_argument("--name", choices=PUBLISHED, help="which one FOLDER is, if its name does not say")
  given = parser.parse_args(arguments)
  folder = pathlib.Path(given.check)
  inside = {} if given.name else {name: folder / name for name in PUBLISHED if (folder / name).is_dir()}
  agree = True
  for name, place in (inside or {given.name: folder}).items():
    try:
      agree &= check(place, name)
    except (ValueError, OSError) as error:
      print(f"error: {error}")
      agree = False
  if inside and len(inside) < len(PUBLISHED):
    print(f"not there: {', '.join(name for name in PUBLISHED if name not in inside)}")
  sys.exit(0 if agree else 1)


if __name__ == "__main__":
  main()
