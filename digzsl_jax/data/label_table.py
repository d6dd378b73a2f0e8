"""Multi-label data sets of one's own: a table of files and labels, or lists of image ids and label numbers.

Shapes: n image, k label.
"""

import csv
import pathlib

import numpy as np

from digzsl_jax.data import tagged_files
from digzsl_jax.data.tagged import MultilabelDataset

_HEADER = ["file", "labels", "split"]
_PARTS = ("train", "test")


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
  rows = read_table(path, _HEADER)
  labels_n = [[label.strip() for label in labels.split(";")] if labels.strip() else [] for _, (_, labels, _) in rows]
  for (line, _), labels in zip(rows, labels_n):
    if "" in labels:
      raise ValueError(f"{path}, line {line}: a label is empty; write one name between two semicolons")
  names = sorted({label for labels in labels_n for label in labels})
  if not names:
    raise ValueError(f"{path}: no image has a label; write them into the column labels, with ; between them")
  tagged_files.check_once(path, [file for _, (file, _, _) in rows])
  hidden = unseen and tagged_files.read_names(path.parent / unseen, "the names of the unseen labels", names)
  return tagged_files.dataset(path.stem, names, hidden, path.parent, parts(path, rows, labels_n, names, _PARTS), size,
                              skip_damaged)


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


def read_table(path: pathlib.Path, header: list[str] | None) -> list[tuple[int, list[str]]]:
  """The rows of a .csv file of three columns with their line numbers; any header will do for None.

  Raises:
    ValueError: no such file, another header, no rows, no text, or a row of other length.
  """
  try:
    with path.open(newline="", encoding="utf-8-sig") as file:
      reader = csv.reader(file, skipinitialspace=True)
      rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if row]
  except FileNotFoundError as error:
    raise ValueError(f"there is no table {path}") from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} is no .csv file in UTF-8 ({error}); save it as one") from error
  if len(rows) < 2:
    raise ValueError(f"{path} must have a header, {','.join(header or _HEADER)}, and rows below it")
  for line, row in rows:
    if len(row) != 3 or not row[0]:
      raise ValueError(f"{path}, line {line}: a row has three columns, the first not empty, but this is "
                       f"{','.join(row)!r}; put what holds a comma in double quotes")
  if header and rows[0][1] != header:
    raise ValueError(f"{path}, line {rows[0][0]}: the header is {','.join(rows[0][1])!r}; it must be "
                     f"{','.join(header)}")
  return rows[1:]


def parts(path: pathlib.Path, rows: list[tuple[int, list[str]]], labels_n: list[list[str]], names: list[str],
          splits: tuple[str, str]) -> dict[str, tuple[list[str], np.ndarray]]:
  """Paths and targets of "train" and "test" out of the rows of a table; `splits` are its words for the two.

  Raises:
    ValueError: another word for the split.
  """
  column = {name: k for k, name in enumerate(names)}
  chosen = {split: ([], []) for split in splits}
  for (line, (file, _, split)), labels in zip(rows, labels_n):
    if split not in chosen:
      raise ValueError(f"{path}, line {line}: the split is {split!r}; it must be {' or '.join(splits)}")
    chosen[split][0].append(file)
    chosen[split][1].append([column[label] for label in labels])
  return {part: (paths, tagged_files.targets(columns_n, len(names)))
          for part, (paths, columns_n) in zip(_PARTS, chosen.values())}


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
