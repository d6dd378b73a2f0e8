"""Data sets of photographs in files: the benchmarks, and a person's own class folders.

Shapes: n image.
"""

import difflib
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources.abc import Traversable

import numpy as np

from digzsl_jax.data import archives, benchmarks, image_folders, pictures, splits, tfds_images

BENCHMARKS = tuple(benchmarks.PUBLISHED)
_LISTED = 20  # file names that a note spells out


def benchmark(name: str, *, folder: str, size: int = 224, validation: int = 1, seed: int = 0, train_per_class: int = 0,
              test_per_class: int = 0, skip_damaged: bool = False, source: str = "files",
              data_dir: str = "") -> splits.Dataset:
  """A benchmark with its photographs.

  Args:
    name: "AWA2", "CUB", "FLO" or "SUN".
    folder: as `archives.load` reads it.
    size: height and width of the pictures (`pictures.Pictures`); best what the encoder takes.
    validation: as in `archives.load`.
    seed: of the draws, and of our own division where there is no archive.
    train_per_class: training pictures drawn of each class, 0 for all.
    test_per_class: test pictures drawn of each class, 0 for all.
    skip_damaged: whether a file that is missing, cut off or no picture is left out and noted, or an error. Damage
      inside a whole file is found when it is decoded, in the first stage, and always an error.
    source: "files" for photographs in `folder`; "tfds" for those that TFDS prepared, of CUB and FLO alone.
    data_dir: where TFDS keeps its data, "" for its own default.

  Raises:
    ValueError: as `archives.load` and `tfds_images.read`; no photographs, or damaged ones; unknown source.
  """
  folder = pathlib.Path(folder).expanduser()
  if source not in ("files", "tfds"):
    raise ValueError(f'source is "{source}": choose files or tfds')
  if source == "tfds" and name not in tfds_images.NAMES:
    raise ValueError(f"TFDS has no {name}, only {' and '.join(tfds_images.NAMES)}; set source=files")
  images, place = tfds_images.read(name, folder, data_dir) if source == "tfds" else (None, folder)
  split = archives.load(folder, name, validation=validation, seed=seed, images=images)
  if split.labels_n is None or split.paths_n is None:
    raise ValueError(f"{folder} holds the rows of {name} but no photographs; unpack the data set there")
  limits = {"trainval_loc": train_per_class, "test_seen_loc": test_per_class, "test_unseen_loc": test_per_class}
  rows = {loc: draw(split.labels_n, getattr(split, loc), limit, (seed, stream))
          for stream, (loc, limit) in enumerate(limits.items())}
  chosen = {part: ([split.paths_n[row] for row in rows[loc]], split.labels_n[rows[loc]])
            for part, loc in zip(("train", "test_seen", "test_unseen"), limits)}
  parts, notes = _labelled(place, chosen, size, skip_damaged)
  return splits.Dataset(name=name.lower(), names=split.names_k, seen=split.seen, unseen=split.unseen,
                        validation=split.validation, **parts, notes=(benchmarks.summary(split), *notes),
                        attributes_ka=split.attributes_ka)


def own(*, folder: str, unseen: str = "unseen.txt", test: str = "", size: int = 224, validation: float = 0.25,
        seed: int = 0, train_per_class: int = 0, test_per_class: int = 0, skip_damaged: bool = False) -> splits.Dataset:
  """Pictures in class folders; a folder's name is the class's name.

  Pictures of unseen classes are test pictures wherever they are. Of a seen class a fifth, drawn, is for test, unless
  `test` is given. Files without a suffix of `pictures.SUFFIXES` are left out and noted.

  Args:
    folder: holds a folder for each class, the pictures in it or below it.
    unseen: text file with a name of an unseen class on each line, relative to `folder`.
    test: another such folder, with test pictures of every seen class, and of unseen ones that have none in `folder`.
    size: as in `benchmark`.
    validation: number of seen classes, or their share if below 1, drawn to play unseen while settings are chosen.
    seed: of all draws.
    train_per_class: as in `benchmark`.
    test_per_class: as in `benchmark`.
    skip_damaged: as in `benchmark`.

  Raises:
    ValueError: no such folder or list, a class without pictures or with too few, an unseen class without test
      pictures, too few seen classes, damaged files.
  """
  root = pathlib.Path(folder).expanduser()
  if (listed := image_folders.lines(root / unseen)) is None:
    raise ValueError(f"there is no list of unseen classes {root / unseen}; write their names into it, one a line")
  found, notes = _class_folders(root, root)
  tests = {}
  if test:
    tests, more = _class_folders(pathlib.Path(test).expanduser(), root)
    notes += more
  _check_classes(root / unseen, listed, found, tests, bool(test))
  names = (*(name for name in found if name not in listed), *listed)
  chosen = {"train": ([], []), "test_seen": ([], []), "test_unseen": ([], [])}
  for label, name in enumerate(names):
    # By name: the draw of a class depends on no other class.
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    here, there = (_shuffled(paths.get(name, []), rng) for paths in (found, tests))
    if name in listed:
      of_class = {"test_unseen": _shuffled([*here, *there], rng)}
    else:
      held = 0 if test else max(1, round(len(here) / 5))
      of_class = {"train": here[held:], "test_seen": there or here[:held]}
    for part, paths in of_class.items():
      limit = train_per_class if part == "train" else test_per_class
      kept = sorted(paths[:limit or None])
      chosen[part][0].extend(kept)
      chosen[part][1].extend([label] * len(kept))
  parts, more = _labelled(root, chosen, size, skip_damaged)
  seen = len(names) - len(listed)
  return splits.Dataset(name=root.resolve().name, names=names, seen=tuple(range(seen)),
                        unseen=tuple(range(seen, len(names))),
                        validation=splits.draw_validation(seen, validation, seed), **parts, notes=(*notes, *more))


def draw(labels_n: np.ndarray, rows: np.ndarray, limit: int, seed: tuple[int, ...]) -> np.ndarray:
  """Of each class up to `limit` of `rows`, drawn, in their order; all for 0. A class's draw depends on no other."""
  if not limit:
    return rows
  kept = []
  for label in np.unique(labels_n[rows]).tolist():
    of_class = rows[labels_n[rows] == label]
    kept.append(np.random.default_rng((*seed, label)).permutation(of_class)[:limit])
  return rows[np.isin(rows, np.concatenate(kept))]


def read(folder: Traversable, chosen: Mapping[str, Sequence[str]], size: int, skip_damaged: bool,
         fit: str = "crop") -> tuple[dict[str, tuple[pictures.Pictures, list[int]]], list[str]]:
  """Opens the pictures of a data set's parts, one of them "train".

  Args:
    folder: as in `pictures.Pictures`.
    chosen: paths by part.
    size: as in `pictures.Pictures`.
    skip_damaged: as in `benchmark`.
    fit: as in `pictures.Pictures`.

  Returns:
    by part the pictures that are whole and their places in its list; and what is to be said of the files, a line each.

  Raises:
    ValueError: damaged files; a size below 1.
  """
  if size < 1:
    raise ValueError(f"size is {size}; it must be at least 1 pixel")
  whole, damaged = pictures.scan(folder, dict.fromkeys(path for paths in chosen.values() for path in paths))
  if damaged and not skip_damaged:
    listed = "; ".join(f"{folder / path} ({wrong})" for path, wrong in list(damaged.items())[:5])
    raise ValueError(f"{len(damaged)} picture files cannot be read: {listed}. Replace or delete them, or set "
                     "skip_damaged=True")
  file_of, parts, notes = {file.path: file for file in whole}, {}, []
  for part, paths in chosen.items():
    kept = [row for row, path in enumerate(paths) if path in file_of]
    parts[part] = pictures.Pictures(folder, [file_of[paths[row]] for row in kept], size, fit), kept
  if damaged:
    notes.append(f"left out {len(damaged)} damaged files: {benchmarks.some(damaged, _LISTED)}")
  trained = {file.digest for file in parts["train"][0].files}
  twice = [file.path for part in chosen if part != "train" for file in parts[part][0].files if file.digest in trained]
  if twice:
    notes.append(f"warning: {len(twice)} test pictures are training pictures too: {benchmarks.some(twice, _LISTED)}")
  return parts, notes


def nearest(name: str, names: Iterable[str]) -> str:
  """A sentence with the names that are spelt nearly as `name`, for messages."""
  spelt = {other.lower(): other for other in sorted(names)}
  near = difflib.get_close_matches(name.lower(), spelt, 3)
  return f"The nearest are {', '.join(repr(spelt[other]) for other in near)}." if near else "No other name is near."


def _labelled(folder: Traversable, chosen: Mapping[str, tuple[Sequence[str], Sequence[int]]], size: int,
              skip_damaged: bool) -> tuple[dict[str, splits.LabelledImages], list[str]]:
  """The parts of a data set from paths and labels, and what is to be said of the files."""
  parts, notes = read(folder, {part: paths for part, (paths, _) in chosen.items()}, size, skip_damaged)
  return {part: splits.LabelledImages(images, np.array(chosen[part][1], np.int32)[kept])
          for part, (images, kept) in parts.items()}, notes


def _class_folders(place: pathlib.Path, root: pathlib.Path) -> tuple[dict[str, list[str]], list[str]]:
  """Paths, relative to `root`, of the pictures of each class folder of `place`; notes on what is no picture."""
  if not place.is_dir():
    raise ValueError(f"there is no folder {place}")
  found, strange = {}, []
  for folder in sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] not in "._"):
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    is_picture = [path.suffix.lower() in pictures.SUFFIXES for path in paths]
    relative = [pathlib.Path(os.path.relpath(path, root)).as_posix() for path in paths]
    found[folder.name] = [path for path, good in zip(relative, is_picture) if good]
    strange += [path for path, good in zip(relative, is_picture) if not good]
    if not found[folder.name]:
      raise ValueError(f"class folder {folder} has no picture ({', '.join(sorted(pictures.SUFFIXES))}); put some "
                       "there or delete it")
  if not found:
    raise ValueError(f"{place} has no class folders; put the pictures of each class in a folder of its name")
  listed = benchmarks.some(strange, _LISTED)
  return found, [f"left out {len(strange)} files that are no pictures by suffix: {listed}"] if strange else []


def _check_classes(path: pathlib.Path, listed: Sequence[str], found: Mapping[str, Sequence[str]],
                   tests: Mapping[str, Sequence[str]], has_tests: bool) -> None:
  """Raises ValueError if the list of unseen classes, `path`, and the class folders do not fit."""
  if not listed or len(set(listed)) < len(listed):
    raise ValueError(f"{path} must name at least one unseen class, each on one line and once")
  for name in listed:
    if name not in found and name not in tests:
      raise ValueError(f"{path}: {name!r} has no class folder, but accuracies on unseen classes need test pictures. "
                       f"{nearest(name, {*found, *tests})} Correct the name, give it pictures, or take it off the "
                       "list")
  seen = [name for name in found if name not in listed]
  for name in tests:
    if name not in found and name not in listed:
      raise ValueError(f"test has class folder {name!r}, which is neither among the training folders nor in {path}. "
                       f"{nearest(name, [*found, *listed])} Rename or delete it")
  if has_tests and (missing := [name for name in seen if name not in tests]):
    raise ValueError(f"test has no pictures of the seen classes {benchmarks.some(missing)}; add their folders, or "
                     "leave `test` empty and a fifth of each class is held out")
  least = 2 if has_tests else 3
  if few := [name for name in seen if len(found[name]) < least]:
    raise ValueError(f"seen classes need {least} or more pictures each, two to train and choose settings on"
                     f"{'' if has_tests else ' and one to test'}: {benchmarks.some(few)} have fewer")
  if len(seen) < 3:
    raise ValueError(f"there are {len(seen)} seen classes, but 3 or more are needed: two to train on while a third "
                     f"plays unseen. Add class folders, or take names off {path}")


def _shuffled(paths: Sequence[str], rng: np.random.Generator) -> list[str]:
  return [paths[row] for row in rng.permutation(len(paths))]
