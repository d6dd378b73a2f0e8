"""Multi-label data sets of one's own: a table of files and labels, or lists of image ids and label numbers.

Shapes: n image, k label.
"""

import pathlib

import numpy as np

from digzsl_jax.data import tagged_files
from digzsl_jax.data.tagged import MultilabelDataset


def load(*, table: str, unseen: str = "", size: int = 224, skip_damaged: bool = False) -> MultilabelDataset:
  """A .csv file with the header `file,labels,split`. The labels are all that occur, in alphabetical order.

  Args:
    table: the .csv file. A row is a picture file, relative to the table; its labels with `;` between them, none if
      empty; and train or test.
    unseen: text file with the name of an unseen label on each line, relative to the table; "" where all are seen.
    size: height and width that pictures are squashed to.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: no such file, another header, a row that cannot be used, or an unseen label that no image has.
  """
  path = pathlib.Path(table).expanduser()
  rows = tagged_files.read_table(path, ["file", "labels", "split"])
  labels_n = [[label.strip() for label in labels.split(";")] if labels.strip() else [] for _, (_, labels, _) in rows]
  for (line, _), labels in zip(rows, labels_n):
    if "" in labels:
      raise ValueError(f"{path}, line {line}: a label is empty; write one name between two semicolons")
  names, parts = tagged_files.from_table(path, rows, labels_n, ("train", "test"))
  hidden = unseen and tagged_files.read_names(path.parent / unseen, "the names of the unseen labels", names)
  return tagged_files.dataset(path.stem, names, hidden, path.parent, parts, size, skip_damaged)


def load_lists(*, folder: str, names: str, test: str, test_images: str, train: str = "", train_images: str = "",
               unseen: str = "", suffix: str = ".jpg", size: int = 224,
               skip_damaged: bool = False) -> MultilabelDataset:
  """Lists as TagCLIP's published code has them: a line is an image's id and the numbers of its labels.

  An image's file is its id with `suffix`. All paths are relative to `folder`.

  Args:
    folder: of everything.
    names: text file with a label on each line; label 0 is that of the first.
    test: list of test images.
    test_images: folder of their pictures.
    train: list of training images; "" for none.
    train_images: folder of their pictures.
    unseen: text file with the name of an unseen label on each line; "" where all are seen.
    suffix: of the pictures.
    size: height and width that pictures are squashed to.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: no such file, or a line that cannot be used.
  """
  root = pathlib.Path(folder).expanduser()
  known = tagged_files.read_names(root / names, "the names of the labels")
  hidden = unseen and tagged_files.read_names(root / unseen, "the names of the unseen labels", known)
  listed = {}
  for part, file, images in (("train", train, train_images), ("test", test, test_images)):
    ids, targets_nk = _read_list(root / file, known) if file else ([], np.zeros((0, len(known)), np.int8))
    listed[part] = [str(pathlib.PurePosixPath(images) / (name + suffix)) for name in ids], targets_nk
  return tagged_files.dataset(root.resolve().name, known, hidden, root, listed, size, skip_damaged)


def _read_list(path: pathlib.Path, names: list[str]) -> tuple[list[str], np.ndarray]:
  ids, columns_n = [], []
  for line, text in enumerate(tagged_files.read_lines(path, "image ids and the numbers of their labels"), 1):
    name, *numbers = text.split()
    if wrong := [number for number in numbers if not number.isdecimal() or int(number) >= len(names)]:
      raise ValueError(f"{path}, line {line}: image {name} has the label {wrong[0]!r}, but labels are numbers from 0 "
                       f"to {len(names) - 1}")
    ids.append(name)
    columns_n.append([int(number) for number in numbers])
  tagged_files.check_once(path, ids)
  return ids, tagged_files.targets(columns_n, len(names))
