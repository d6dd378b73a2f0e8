"""Multi-label data sets: images that hold several labels each, and which labels are seen and unseen.

Shapes: n image, h w pixel, c colour channel (RGB), k label, t position, e feature.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from digzsl_jax.data.benchmarks import some
from digzsl_jax.data.pictures import Pictures


class Tagged(NamedTuple):
  """Images and what they hold, row by row."""

  images_nhwc: np.ndarray | Pictures  # uint8; or features [n, t, e] that stand in place of images
  targets_nk: np.ndarray  # int8: 1 present, 0 absent, -1 not judged (VOC's "difficult"); columns as the names

  def take(self, rows) -> "Tagged":
    """The images and targets of `rows`: indices, or a mask `[n]`."""
    images = self.images_nhwc
    return Tagged(images.take(rows) if isinstance(images, Pictures) else images[rows], self.targets_nk[rows])


@dataclasses.dataclass(frozen=True)
class MultilabelDataset:
  """A multi-label data set, zero-shot if `unseen` is not empty.

  Targets say of all labels what the files say, unseen ones included: those of training images serve the upper bound of
  supervised training alone. Training reads `seen_targets`.

  Attributes:
    name: for reports.
    names: of all labels, the columns of the targets.
    seen: columns of labels that training may read.
    unseen: columns of labels known by name alone; may be empty.
    train: training images; there may be none, as TagCLIP trains nothing.
    test: test images, of labels of both lists.
    notes: what is to be said of the files, a line each.

  Raises:
    ValueError: names that repeat, lists that overlap, repeat or leave out a label, images or targets that are
      misshapen, no test images, or training images without any seen label.
  """
  name: str
  names: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  train: Tagged
  test: Tagged
  notes: tuple[str, ...] = ()

  def __post_init__(self):
    self._check_lists()
    for field in ("train", "test"):
      self._check_images(field)
    if not len(self.test.targets_nk):
      raise ValueError(f"{self.name}: there are no test images")
    if len(self.train.targets_nk) and not (self.train.targets_nk[:, self.seen] == 1).any():
      raise ValueError(f"{self.name}: no training image holds a seen label")

  @property
  def has_images(self) -> bool:
    """Whether there are images, not features in place of them."""
    return self.test.images_nhwc.dtype.kind != "f"

  def seen_targets(self) -> np.ndarray:
    """`[n, k]` of the training images, columns in the order of `seen`: all that training may read.

    Raises:
      ValueError: there are no training images.
    """
    if not len(self.train.targets_nk):
      raise ValueError(f"{self.name} has no training images; give config.data those files")
    return self.train.targets_nk[:, self.seen]

  def _check_lists(self):
    if len(set(self.names)) < len(self.names):
      repeated = sorted({name for name in self.names if self.names.count(name) > 1})
      raise ValueError(f"{self.name}: label names must differ, but these repeat: {some(repeated)}")
    columns = (*self.seen, *self.unseen)
    if wrong := [column for column in columns if not 0 <= column < len(self.names)]:
      raise ValueError(f"{self.name}: a list holds column {wrong[0]}, but columns go from 0 to {len(self.names) - 1}, "
                       "the positions of the label names")
    for wrong, what in ((set(self.seen) & set(self.unseen), "are both seen and unseen"),
                        ({column for column in columns if columns.count(column) > 1}, "come twice in a list"),
                        (set(range(len(self.names))) - set(columns), "are neither seen nor unseen")):
      if wrong:
        raise ValueError(f"{self.name}: labels {some(self.names[column] for column in sorted(wrong))} {what}; every "
                         "label belongs to one list")
    if not self.seen:
      raise ValueError(f"{self.name}: the list of seen labels is empty")

  def _check_images(self, field: str):
    images, targets_nk = getattr(self, field)
    if self.has_images and (images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8):
      raise ValueError(f"{self.name}: {field} images must be uint8 [n, h, w, 3], not {images.dtype} "
                       f"{list(images.shape)}")
    if targets_nk.dtype != np.int8 or targets_nk.shape != (len(images), len(self.names)):
      raise ValueError(f"{self.name}: {field} targets of {len(images)} images and {len(self.names)} labels must be "
                       f"int8 [{len(images)}, {len(self.names)}], not {targets_nk.dtype} {list(targets_nk.shape)}")
    if targets_nk.size and not -1 <= targets_nk.min() <= targets_nk.max() <= 1:
      raise ValueError(f"{self.name}: {field} targets must be 1 (present), 0 (absent) or -1 (not judged)")
