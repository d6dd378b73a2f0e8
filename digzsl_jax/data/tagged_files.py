"""What the multi-label data sets of picture files have in common.

Shapes: n image, k label.
"""

import csv
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from digzsl_jax.data import benchmarks, image_folders, photographs
from digzsl_jax.data.tagged import MultilabelDataset, Tagged


def dataset(name: str, names: Sequence[str], unseen: Sequence[str], folder: pathlib.Path,
            parts: Mapping[str, tuple[Sequence[str], np.ndarray]], size: int,
            skip_damaged: bool) -> MultilabelDataset:
  """A data set of whole pictures, squashed to squares (`pictures.Pictures`). All labels but the unseen ones are seen.

  Args:
    name: for reports.
    names: of all labels.
    unseen: names of unseen labels.
    folder: what the paths are relative to.
    parts: paths and targets `[n, k]` of "train" and "test".
    size: height and width of the pictures.
    skip_damaged: as in `photographs.benchmark`.

  Raises:
    ValueError: as `photographs.read` and `MultilabelDataset`.
  """
  found, notes = photographs.read(folder, {part: paths for part, (paths, _) in parts.items()}, size, skip_damaged,
                                  fit="squash")
  tagged = {part: Tagged(images, parts[part][1][kept]) for part, (images, kept) in found.items()}
  return MultilabelDataset(name, tuple(names), *divided(names, unseen), **tagged, notes=tuple(notes))


def divided(names: Sequence[str], unseen: Iterable[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Columns of the seen labels, which are all others, and of the `unseen` ones."""
  unseen = set(unseen)
  return (tuple(k for k, name in enumerate(names) if name not in unseen),
          tuple(k for k, name in enumerate(names) if name in unseen))


def targets(columns_n: Sequence[Sequence[int]], labels: int) -> np.ndarray:
  """int8 `[n, k]` out of the columns of the labels that each image holds."""
  targets_nk = np.zeros((len(columns_n), labels), np.int8)
  rows = np.repeat(np.arange(len(columns_n)), [len(columns) for columns in columns_n])
  targets_nk[rows, np.fromiter(itertools.chain.from_iterable(columns_n), np.int64, len(rows))] = 1
  return targets_nk


def read_table(path: pathlib.Path, header: list[str] | None = None) -> list[tuple[int, list[str]]]:
  """The rows of a .csv file of three columns with their line numbers. Its header is `header`, or any if None.

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
    raise ValueError(f"{path} must have a header and rows below it")
  for line, row in rows:
    if len(row) != 3 or not row[0]:
      raise ValueError(f"{path}, line {line}: a row has three columns, the first not empty, but this is "
                       f"{','.join(row)!r}; put what holds a comma in double quotes")
  if header and rows[0][1] != header:
    raise ValueError(f"{path}, line {rows[0][0]}: the header is {','.join(rows[0][1])!r}; it must be "
                     f"{','.join(header)}")
  return rows[1:]


def from_table(path: pathlib.Path, rows: Sequence[tuple[int, Sequence[str]]], labels_n: Sequence[Sequence[str]],
               splits: tuple[str, str]) -> tuple[list[str], dict[str, tuple[list[str], np.ndarray]]]:
  """All labels in alphabetical order, and the parts that `dataset` takes.

  Args:
    path: of the table.
    rows: its rows: line number, and file, labels and split.
    labels_n: the labels of each row.
    splits: the table's words for train and test.

  Raises:
    ValueError: no labels, a file that repeats, another word for the split.
  """
  names = sorted(set(itertools.chain.from_iterable(labels_n)))
  if not names:
    raise ValueError(f"{path}: no image has a label; the second column holds them")
  check_once(path, [file for _, (file, _, _) in rows])
  column = {name: k for k, name in enumerate(names)}
  chosen = {split: ([], []) for split in splits}
  for (line, (file, _, split)), labels in zip(rows, labels_n):
    if split not in chosen:
      raise ValueError(f"{path}, line {line}: the split is {split!r}; it must be {' or '.join(splits)}")
    paths, columns_n = chosen[split]
    paths.append(file)
    columns_n.append([column[label] for label in labels])
  return names, {part: (paths, targets(columns_n, len(names)))
                 for part, (paths, columns_n) in zip(("train", "test"), chosen.values())}


def read_json(path: pathlib.Path, what: str, hook: Callable[[dict], Any] | None = None) -> Any:
  """A JSON file, its objects as `hook` changes them.

  Raises:
    ValueError: it is absent or no JSON; the message says `what` it holds.
  """
  try:
    with path.open(encoding="utf-8") as file:
      return json.load(file, object_hook=hook)
  except FileNotFoundError as error:
    raise ValueError(f"there is no {path}; it holds {what}") from error
  except ValueError as error:
    raise ValueError(f"{path} is no JSON ({error}); get it again") from error


def read_lines(path: pathlib.Path, what: str) -> list[str]:
  """The lines of a text file that are not empty.

  Raises:
    ValueError: it is absent, empty, or no text file; the message says `what` should be in it.
  """
  found = image_folders.lines(path)
  if not found:
    raise ValueError(f"{path} {'is missing' if found is None else 'is empty'}; it holds {what}, one a line")
  return found


def read_names(path: pathlib.Path, what: str, known: Iterable[str] | None = None) -> list[str]:
  """Names of labels, one a line, each once and, where they are given, one of those `known`.

  Raises:
    ValueError: as `read_lines`; a name that repeats or is unknown.
  """
  names = read_lines(path, what)
  check_names(path, names, names if known is None else known)
  return names


def check_names(path: pathlib.Path, names: Sequence[str], known: Iterable[str]) -> None:
  """Raises ValueError if a name of the list `path` repeats or is not among those `known`."""
  check_once(path, names)
  known = set(known)
  if strange := [name for name in names if name not in known]:
    raise ValueError(f"{path}: no image has the label {strange[0]!r}. {photographs.nearest(strange[0], known)} Correct "
                     "the name or take it off the list")


def check_once(path: pathlib.Path, items: Sequence[str]) -> None:
  """Raises ValueError if a line of `path`, an image or a label, repeats."""
  if len(set(items)) < len(items):
    seen = set()
    repeated = [item for item in items if item in seen or seen.add(item)]
    raise ValueError(f"{path}: {benchmarks.some(repeated)} listed more than once; keep one line of each")
