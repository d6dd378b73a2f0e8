"""Data sets of features in place of images: `res101.mat` of the Proposed Splits, or a file of one's own like it.

What the archive of the Proposed Splits (arXiv 1707.00600) calls features are pooled activations of a ResNet-101; any
others in the same layout will do. Vectors for classes come from `.npz` files.

Shapes: n image, k class, f feature, a attribute, p prototype.
"""

import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from digzsl_jax.data import archives, benchmarks, image_folders, matlab, splits


def load(*, folder: str, benchmark: str = "", file: str = "res101.mat", validation: float = 1,
         seed: int = 0) -> splits.Dataset:
  """Features, labels, attributes and lists of an archive; images are not looked at.

  Args:
    folder: holds `att_splits.mat` and `file`.
    benchmark: "AWA2", "CUB", "FLO" or "SUN", whose classes and lists the archive then must have; "" for an archive
      of one's own: its classes are named by `allclasses_names` in `att_splits.mat` or by `allclasses.txt`, and the
      images of `trainval_loc` and `test_unseen_loc` say which of them are seen and unseen.
    file: MATLAB file with `features` `[f, n]` and `labels` `[n, 1]`, which count from 1.
    validation: the published division of seen classes, 1 to 3; of one's own archive the number of seen classes, or
      their share if below 1, drawn to play unseen while settings are chosen.
    seed: of that draw.

  Raises:
    ValueError: files that are absent, damaged, of different releases, or counted from 0.
    OSError: a file cannot be read.
  """
  place = pathlib.Path(folder).expanduser()
  for path in (place / "att_splits.mat", place / file):
    if not path.is_file():
      raise ValueError(f"there is no {path}; it is part of the archive of the Proposed Splits")
  features_nf, labels_n = _read_features(place / file)
  if benchmark:
    split = archives.load(place, benchmark, validation=validation)
    _check_count(place, {loc: getattr(split, loc) for loc in benchmarks.LOCS}, labels_n)
  else:
    split = _own_archive(place, labels_n, validation, seed)
  if split.labels_n is not None and not np.array_equal(split.labels_n, labels_n):
    raise ValueError(f"{place / file} has other labels than {place / 'res101.mat'}; get both from one release")
  parts = [splits.LabelledFeatures(features_nf[rows_r], labels_n[rows_r])
           for rows_r in (getattr(split, loc) for loc in benchmarks.LOCS)]
  return splits.Dataset(split.name.lower(), split.names_k, split.seen, split.unseen, split.validation, *parts,
                        attributes_ka=split.attributes_ka)


def read_prototypes(path: os.PathLike, names: Sequence[str]) -> np.ndarray:
  """`[k, p]`, float32, of the classes `names` in their order, from an `.npz` file of `names` and `prototypes`.

  Raises:
    ValueError: the file is absent, damaged or misshapen, or lacks a class.
  """
  path = pathlib.Path(path).expanduser()
  try:
    with np.load(path, allow_pickle=False) as stored:
      listed, vectors_kp = (stored[field] for field in ("names", "prototypes"))
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} cannot be read as an .npz file with the arrays `names` and `prototypes` ({error}); write "
                     "it with numpy.savez(file, names=..., prototypes=...)") from error
  row_of = {str(name): row for row, name in enumerate(listed.ravel())}
  if vectors_kp.ndim != 2 or vectors_kp.dtype.kind != "f" or not len(row_of) == len(vectors_kp) == listed.size:
    raise ValueError(f"{path}: prototypes are {vectors_kp.dtype} {list(vectors_kp.shape)} for {listed.size} names; "
                     "give each class one row of numbers, and each name once")
  if missing := [name for name in names if name not in row_of]:
    raise ValueError(f"{path} has no prototype of {benchmarks.some(missing)}; it names {benchmarks.some(row_of)}")
  found_kp = vectors_kp[[row_of[name] for name in names]].astype(np.float32)
  if not np.isfinite(found_kp).all() or not found_kp.any(1).all():
    raise ValueError(f"{path}: a prototype is zero or not finite; cosines are not defined for it")
  return found_kp


def _read_features(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """`(features_nf, labels_n)`, labels counted from 0."""
  found = matlab.read(path, ["features", "labels"])
  features_fn, labels = (found.get(field) for field in ("features", "labels"))
  if not isinstance(features_fn, np.ndarray) or not isinstance(labels, np.ndarray):
    raise ValueError(f"{path} must hold the numbers features and labels; it lacks one of them")
  labels_n = labels.ravel().astype(np.int32) - 1
  if features_fn.ndim != 2 or features_fn.shape[1] != len(labels_n):
    raise ValueError(f"{path}: features are {list(features_fn.shape)}, but must have a column for each of "
                     f"{len(labels_n)} labels")
  if labels_n.min(initial=0) < 0:
    raise ValueError(f"{path}: labels count from 0, but must count from 1; get the file again")
  return np.ascontiguousarray(features_fn.T, np.float32), labels_n


def _own_archive(folder: pathlib.Path, labels_n: np.ndarray, validation: float, seed: int) -> benchmarks.Split:
  path = folder / "att_splits.mat"
  found = matlab.read(path, ["allclasses_names", "att", *benchmarks.LOCS])
  names = image_folders.lines(folder / "allclasses.txt") or found.get("allclasses_names")
  if not isinstance(names, list):
    raise ValueError(f"{path} has no allclasses_names, nor is there {folder / 'allclasses.txt'}; write a class name on "
                     "each line of the latter, in the order of the labels")
  archives.check_numbers(path, found)
  rows = archives.rows(path, {loc: found[loc] for loc in benchmarks.LOCS})
  _check_count(folder, rows, labels_n)
  seen, unseen = (tuple(np.unique(labels_n[rows[loc]]).tolist()) for loc in ("trainval_loc", "test_unseen_loc"))
  chosen = splits.draw_validation(len(seen), validation, seed)
  return benchmarks.Split(name=folder.resolve().name, raw_names_k=tuple(names), seen=seen, unseen=unseen,
                          validation=tuple(seen[place] for place in chosen), **rows, labels_n=labels_n,
                          attributes_ka=archives.attributes(path, found, len(names)))


def _check_count(folder: pathlib.Path, rows: Mapping[str, np.ndarray], labels_n: np.ndarray) -> None:
  if (most := max(rows_r.max() for rows_r in rows.values())) >= len(labels_n):
    raise ValueError(f"{folder / 'att_splits.mat'} counts {most + 1} images, but there are features of "
                     f"{len(labels_n)}; get both files from one release")
