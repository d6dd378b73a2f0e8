"""NUS-WIDE (Chua et al., CIVR 2009): 925 seen tags of Flickr users, 81 unseen concepts of annotators.

The original lists, each in the folder itself or in the one of its archive:

    [ImageList/]           Imagelist.txt, TrainImagelist.txt, TestImagelist.txt   lines "actor\\0001_2124494179.jpg"
    [NUS_WID_Tags/]        TagList1k.txt, AllTags1k.txt     names; of each image 1,000 times 0 or 1
    [ConceptsList/]        Concepts81.txt
    [Groundtruth/]AllLabels/Labels_*.txt                    of each concept a 0 or 1 for each image
    Flickr/                the pictures

The seen tags are those that are no concept, in the order of TagList1k.txt; the concepts follow in theirs: the 1,006
labels of LESA and BiAM (github.com/akshitac8/BiAM), whose test images are all 107,859.

Shapes: r row of the lists, k label.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from digzsl_jax.data import benchmarks, tagged_files
from digzsl_jax.data.tagged import MultilabelDataset


def load(*, folder: str, images: str = "Flickr", size: int = 224, skip_damaged: bool = False) -> MultilabelDataset:
  """The data set by its original lists.

  Many of its pictures are no longer on Flickr: copies lack some, and `skip_damaged` leaves those out.

  Args:
    folder: as above.
    images: folder of the pictures, relative to `folder`.
    size: height and width that pictures are squashed to.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: files that are missing, broken or of different lengths; missing pictures.
  """
  root = pathlib.Path(folder).expanduser()
  tags, concepts = read_lists(root)
  seen = [k for k, tag in enumerate(tags) if tag not in set(concepts)]
  row = {path: r for r, path in enumerate(_image_list(root, "Imagelist.txt"))}
  targets_rk = np.empty((len(row), len(seen) + len(concepts)), np.int8)
  targets_rk[:, :len(seen)] = read_digits(_find(root, "AllTags1k.txt", "NUS_WID_Tags"), len(row), len(tags))[:, seen]
  for k, concept in enumerate(concepts, len(seen)):
    path = _find(root, f"Labels_{concept}.txt", "Groundtruth/AllLabels", "AllLabels")
    targets_rk[:, k] = read_digits(path, len(row), 1)[:, 0]
  parts = {}
  for part, name in (("train", "TrainImagelist.txt"), ("test", "TestImagelist.txt")):
    paths = _image_list(root, name)
    if strange := [path for path in paths if path not in row]:
      raise ValueError(f"{name} has images that Imagelist.txt lacks: {benchmarks.some(strange)}; get both from one "
                       "archive")
    parts[part] = [f"{images}/{path}" for path in paths], targets_rk[[row[path] for path in paths]]
  names = [*(tags[k] for k in seen), *concepts]
  return tagged_files.dataset("nus-wide", names, concepts, root, parts, size, skip_damaged)


def load_csv(*, folder: str, size: int = 224, skip_damaged: bool = False) -> MultilabelDataset:
  """The data set by the files of ML-Decoder's authors (github.com/Alibaba-MIIL/ML_Decoder), in the folder of pictures.

  `data.csv` has a picture file, "[label, label]" and train or val in each row; `benchmark_81_v0.json` names the unseen
  labels, its "test class". The labels are all that occur, sorted, as in the published code.

  Args:
    folder: holds both and the pictures.
    size: as in `load`.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: files that are missing or broken, an unseen label that no image has, missing pictures.
  """
  root = pathlib.Path(folder).expanduser()
  path = root / "data.csv"
  rows = tagged_files.read_table(path)
  labels_n = []
  for line, (_, labels, _) in rows:
    if not (labels.startswith("[") and labels.endswith("]")):
      raise ValueError(f"{path}, line {line}: the labels are {labels!r}; they must be [label, label]")
    labels_n.append([label for label in labels[1:-1].split(", ") if label])
  names, parts = tagged_files.from_table(path, rows, labels_n, ("train", "val"))
  return tagged_files.dataset("nus-wide-csv", names, _unseen(root / "benchmark_81_v0.json", names), root, parts, size,
                              skip_damaged)


def read_lists(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """The 1,000 tags and the 81 concepts.

  Raises:
    ValueError: a file is missing, empty or repeats a name.
  """
  return (tagged_files.read_names(_find(folder, "TagList1k.txt", "NUS_WID_Tags", "ConceptsList"), "the tags"),
          tagged_files.read_names(_find(folder, "Concepts81.txt", "ConceptsList"), "the concepts"))


def read_digits(path: pathlib.Path, rows: int, columns: int) -> np.ndarray:
  """int8 `[r, k]` out of a text file with `columns` times 0 or 1 on each line.

  Raises:
    ValueError: something else, or another number of lines.
  """
  text = path.read_bytes()
  digits = text.translate(None, b" \t\r\n")
  if len(digits) == rows * columns and not digits.strip(b"01"):
    return (np.frombuffer(digits, np.int8) - ord("0")).reshape(rows, columns)
  lines = text.splitlines()
  for number, line in enumerate(lines, 1):
    if len(found := line.split()) != columns or set(found) - {b"0", b"1"}:
      raise ValueError(f"{path}, line {number} is not {columns} times 0 or 1; get the file again")
  raise ValueError(f"{path} has {len(lines)} lines, but Imagelist.txt {rows}; get both from one archive")


def _image_list(root: pathlib.Path, name: str) -> list[str]:
  path = _find(root, name, "ImageList")
  paths = [line.replace("\\", "/") for line in tagged_files.read_lines(path, "picture files")]
  tagged_files.check_once(path, paths)
  return paths


def _find(root: pathlib.Path, name: str, *folders: str) -> pathlib.Path:
  places = [root / folder / name for folder in (*folders, "")]
  found = next((place for place in places if place.is_file()), None)
  if found is None:
    raise ValueError(f"there is no {places[0]}; unpack NUS-WIDE's lists into {root}")
  return found


def _unseen(path: pathlib.Path, names: Sequence[str]) -> list[str]:
  found = tagged_files.read_json(path, "the names of the unseen labels")
  unseen = found.get("test class") if isinstance(found, dict) else None
  if not isinstance(unseen, list) or not unseen:
    raise ValueError(f'{path} must hold {{"test class": [names]}}; get it again')
  tagged_files.check_names(path, unseen, names)
  if both := set(unseen) & set(found.get("train class", ())):
    raise ValueError(f"{path}: {benchmarks.some(sorted(both))} both in train class and test class; keep one")
  return unseen
