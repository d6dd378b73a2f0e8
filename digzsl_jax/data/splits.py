"""Data sets split by class: what is seen, what is unseen, and which classes settings are chosen on.

Shapes: n image, h w pixel, c colour channel (RGB), f feature, k class, a attribute.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from digzsl_jax.data.pictures import Pictures


class LabelledImages(NamedTuple):
  """Images and their labels, row by row."""

  images_nhwc: np.ndarray | Pictures  # uint8
  labels_n: np.ndarray  # int32, positions in `Dataset.names`

  def take(self, rows) -> "LabelledImages":
    """The images and labels of `rows`: indices, or a mask `[n]`."""
    images = self.images_nhwc
    return LabelledImages(images.take(rows) if isinstance(images, Pictures) else images[rows], self.labels_n[rows])


class LabelledFeatures(NamedTuple):
  """Features of images that are not at hand, and their labels, row by row."""

  features_nf: np.ndarray  # float32
  labels_n: np.ndarray  # as in `LabelledImages`

  def take(self, rows) -> "LabelledFeatures":
    """The features and labels of `rows`: indices, or a mask `[n]`."""
    return LabelledFeatures(self.features_nf[rows], self.labels_n[rows])


Labelled = LabelledImages | LabelledFeatures


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A zero-shot data set: of images, or of features in place of all of them.

  Attributes:
    name: for reports.
    names: all class names; a label is a position in it. May hold classes that no list uses.
    seen: labels with training images.
    unseen: labels known by name alone.
    validation: the seen labels that play unseen while settings are chosen.
    train: real images of seen classes.
    test_seen: held-out images of seen classes.
    test_unseen: held-out images of unseen classes.
    real_unseen: real training images of unseen classes, for the "real_images" upper bound and nothing
      else; None where there are none.
    notes: what is to be said of the files, a line each.
    attributes_ka: of all classes, or None.

  Raises:
    ValueError: lists that overlap, repeat or name no class, a validation list that leaves fewer than two
      seen classes, and image sets that are empty, misshapen, or lack or exceed the classes of their list.
  """
  name: str
  names: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  validation: tuple[int, ...]
  train: Labelled
  test_seen: Labelled
  test_unseen: Labelled
  real_unseen: Labelled | None = None
  notes: tuple[str, ...] = ()
  attributes_ka: np.ndarray | None = None

  def __post_init__(self):
    self._check_lists()
    _check_images(self, (("train", self.seen), ("test_seen", self.seen), ("test_unseen", self.unseen),
                         ("real_unseen", self.unseen)))
    if self.attributes_ka is not None and len(self.attributes_ka) != len(self.names):
      raise ValueError(f"{self.name}: attributes of {len(self.attributes_ka)} classes, but there are "
                       f"{len(self.names)}; give every class a row")

  @property
  def has_images(self) -> bool:
    return isinstance(self.train, LabelledImages)

  def _check_lists(self):
    if len(set(self.names)) < len(self.names):
      repeated = sorted({n for n in self.names if self.names.count(n) > 1})
      raise ValueError(f"{self.name}: class names must differ, but these repeat: {', '.join(repeated)}")
    for field in ("seen", "unseen", "validation"):
      labels = getattr(self, field)
      if not labels:
        raise ValueError(f"{self.name}: the list of {field} classes is empty")
      if len(set(labels)) < len(labels):
        raise ValueError(f"{self.name}: the list of {field} classes repeats a class")
      wrong = [label for label in labels if not 0 <= label < len(self.names)]
      if wrong:
        raise ValueError(f"{self.name}: {field} holds label {wrong[0]}, but labels go from 0 to "
                         f"{len(self.names) - 1}, the positions of the class names")
    both = set(self.seen) & set(self.unseen)
    if both:
      raise ValueError(f"{self.name}: classes both seen and unseen: {_spell(self.names, both)}; "
                       "every class belongs to one list")
    strange = set(self.validation) - set(self.seen)
    if strange:
      raise ValueError(f"{self.name}: validation classes that are not seen: {_spell(self.names, strange)}; "
                       "choose validation classes from the seen list")
    if len(self.seen) - len(self.validation) < 2:
      raise ValueError(f"{self.name}: {len(self.validation)} of {len(self.seen)} seen classes are for "
                       "validation, which leaves fewer than two to train on; choose fewer")


@dataclasses.dataclass(frozen=True)
class Task:
  """One zero-shot problem, the real one or its stand-in: what runs work on. Fields as in `Dataset`."""
  name: str
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  train: Labelled
  test_seen: Labelled
  test_unseen: Labelled
  real_unseen: Labelled | None

  def positions(self, labels_n: np.ndarray) -> np.ndarray:
    """Labels as positions among the task's classes, seen ones first: the columns of its classifiers."""
    position = {label: row for row, label in enumerate((*self.seen, *self.unseen))}
    return np.array([position[label] for label in labels_n.tolist()])


def tasks(dataset: Dataset) -> dict[str, Task]:
  """The "test" task, and the "validation" task on which settings are chosen.

  Validation sees training images of seen classes alone. Its unseen classes are `dataset.validation`; of
  each remaining class every fourth image (in file order) is held out for its `test_seen`; of each
  validation class every second is `test_unseen` and the others `real_unseen`.

  Raises:
    ValueError: a class with too few training images to divide.
  """
  labels_n = dataset.train.labels_n
  rank_n = _rank(labels_n)
  pseudo_n = np.isin(labels_n, dataset.validation)
  held_n = rank_n % np.where(pseudo_n, 2, 4) == 1
  counts = np.bincount(labels_n, minlength=len(dataset.names))
  few = [label for label in dataset.seen if counts[label] < 2]
  if few:
    raise ValueError(f"{dataset.name}: the validation task needs 2 or more training images a class, but "
                     f"these have fewer: {_spell(dataset.names, few)}")
  take = dataset.train.take
  return {
    "test": Task("test", dataset.seen, dataset.unseen, dataset.train, dataset.test_seen,
                 dataset.test_unseen, dataset.real_unseen),
    "validation": Task("validation", tuple(k for k in dataset.seen if k not in dataset.validation),
                       dataset.validation, take(~pseudo_n & ~held_n), take(~pseudo_n & held_n),
                       take(pseudo_n & held_n), take(pseudo_n & ~held_n)),
  }


def draw_validation(seen: int, validation: float, seed: int) -> tuple[int, ...]:
  """Labels, drawn, of as many of the first `seen` classes as `validation` says: a number, or a share below 1."""
  count = max(1, round(seen * validation)) if validation < 1 else int(validation)
  if validation <= 0 or validation > 1 and count != validation or count > seen - 2:
    raise ValueError(f"validation is {validation}; it must be a number from 1 to {seen - 2} of the {seen} seen "
                     "classes, or a share of them below 1 that leaves two to train on")
  return tuple(sorted(np.random.default_rng(seed).permutation(seen)[:count].tolist()))


def fingerprint(dataset: Dataset) -> str:
  """SHA-256 (hex) of everything in the data set: names, lists, labels, image bytes or `Pictures.fingerprint`, notes."""
  digest = hashlib.sha256()
  for field in dataclasses.fields(dataset):
    value = getattr(dataset, field.name)
    if field.name == "attributes_ka" and value is None or field.name == "notes" and not value:
      continue
    digest.update(f"\0{field.name}\0".encode())
    if isinstance(value, Labelled):
      rows = value[0]
      digest.update(repr(rows.shape).encode())
      digest.update(rows.fingerprint if isinstance(rows, Pictures) else np.ascontiguousarray(rows))
      digest.update(np.ascontiguousarray(value.labels_n, dtype="<i4"))
    elif isinstance(value, np.ndarray):
      digest.update(repr(value.shape).encode() + np.ascontiguousarray(value, dtype="<f8").tobytes())
    else:
      digest.update(repr(value).encode())
  return digest.hexdigest()


def summary(dataset: Dataset) -> str:
  """One line of counts, for logs."""
  chosen = {field: getattr(dataset, field) for field in ("train", "test_seen", "test_unseen", "real_unseen")}
  counts = ", ".join(f"{field} {0 if found is None else len(found.labels_n)}" for field, found in chosen.items())
  sides = dataset.train[0].shape[1:3]
  what = f"images of {sides[0]}x{sides[1]} pixels" if dataset.has_images else f"features of width {sides[0]}"
  return (f"{dataset.name}: {len(dataset.seen)} seen classes ({len(dataset.validation)} of them for validation), "
          f"{len(dataset.unseen)} unseen; {what}: {counts}")


def _check_images(dataset: Dataset, sets) -> None:
  for field, classes in sets:
    chosen = getattr(dataset, field)
    if chosen is None and field == "real_unseen":
      continue
    rows, labels_n = chosen
    if not isinstance(chosen, type(dataset.train)):
      raise ValueError(f"{dataset.name}: {field} must be as train is, images or features")
    if dataset.has_images and (rows.ndim != 4 or rows.shape[-1] != 3 or rows.dtype != np.uint8):
      raise ValueError(f"{dataset.name}: {field} images must be uint8 [n, h, w, 3], not "
                       f"{rows.dtype} {list(rows.shape)}")
    if not dataset.has_images and (rows.ndim != 2 or rows.dtype != np.float32 or not np.isfinite(rows).all()):
      raise ValueError(f"{dataset.name}: {field} features must be finite float32 [n, f], not "
                       f"{rows.dtype} {list(rows.shape)}")
    if labels_n.dtype != np.int32 or labels_n.shape != rows.shape[:1]:
      raise ValueError(f"{dataset.name}: {field} has {len(rows)} images, so its labels must be int32 "
                       f"[{len(rows)}], not {labels_n.dtype} {list(labels_n.shape)}")
    if not len(labels_n):
      raise ValueError(f"{dataset.name}: {field} has no images")
    found = set(np.unique(labels_n).tolist())
    if found - set(classes):
      wrong = found - set(classes)
      named = {k for k in wrong if 0 <= k < len(dataset.names)}
      raise ValueError(f"{dataset.name}: {field} has images of classes outside its list: "
                       f"{_spell(dataset.names, named) if named else sorted(wrong)}")
    if set(classes) - found:
      missing = _spell(dataset.names, set(classes) - found)
      raise ValueError(f"{dataset.name}: {field} has no image of {missing}")


def _rank(labels_n: np.ndarray) -> np.ndarray:
  """For each image, how many of its class come before it."""
  order = np.argsort(labels_n, kind="stable")
  sorted_n = labels_n[order]
  first_n = np.searchsorted(sorted_n, sorted_n)
  rank_n = np.empty(len(labels_n), np.int64)
  rank_n[order] = np.arange(len(labels_n)) - first_n
  return rank_n


def _spell(names: tuple[str, ...], labels) -> str:
  return ", ".join(names[label] for label in sorted(labels))
