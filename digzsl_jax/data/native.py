"""Pictures at their own size, in whole patches, and the few common shapes that they are padded to.

Shapes: n picture, h w pixel, c colour channel (RGB); 2 is height and width, or rows and columns.
"""

import abc
import functools
import math
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from digzsl_jax.data import pictures

MOST_PATCHES = 1600  # 640x640 pixels in patches of 16


class Native(abc.ABC):
  """Pictures of any size, each resized (bicubic) up to whole patches, as TagCLIP has it.

  One of more than `most_patches` patches is reduced first: what attention needs grows with their square. It keeps its
  aspect, to a patch, loses nothing to aliasing, and each side keeps at least one patch.
  """

  def __init__(self, patch: int, most_patches: int):
    self.patch, self.most_patches = patch, most_patches

  @abc.abstractmethod
  def __len__(self) -> int:
    ...

  @property
  @abc.abstractmethod
  def sizes_n2(self) -> np.ndarray:
    """Height and width in pixels of every picture as it is shown; nothing is decoded for it."""

  @abc.abstractmethod
  def _image(self, row: int) -> Image.Image:
    ...

  def shown(self, row: int) -> np.ndarray:
    """uint8 RGB `[h, w, c]` of `sizes_n2`: the picture as a person sees it.

    Raises:
      ValueError: a file is missing or damaged.
    """
    return np.asarray(self._image(row))

  @functools.cached_property
  def grids_n2(self) -> np.ndarray:
    """Rows and columns of patches of every picture."""
    grids = [grid(int(height), int(width), self.patch, self.most_patches) for height, width in self.sizes_n2]
    return np.array(grids, np.int32).reshape(-1, 2)

  def pixels(self, row: int) -> np.ndarray:
    """uint8 RGB `[h, w, c]` of whole patches.

    Raises:
      ValueError: a file is missing or damaged.
    """
    image = self._image(row)
    rows, columns = grid(image.height, image.width, self.patch, self.most_patches)
    size = columns * self.patch, rows * self.patch
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


class NativePictures(Native):
  """Picture files, turned and converted as those of `pictures.Pictures`."""

  def __init__(self, folder: Traversable, files: Sequence[pictures.File], patch: int, most_patches: int = MOST_PATCHES):
    super().__init__(patch, most_patches)
    self.folder, self.files = folder, tuple(files)

  def __len__(self) -> int:
    return len(self.files)

  @functools.cached_property
  def sizes_n2(self) -> np.ndarray:
    """As `Native` says.

    Raises:
      ValueError: a file is missing or no picture.
    """
    return np.array(pictures.in_threads(self._size, self.files, "sizes of pictures"), np.int32).reshape(-1, 2)

  def _size(self, file: pictures.File) -> tuple[int, int]:
    with pictures.opened(self.folder / file.path) as image:
      # Of a PNG Pillow reads all there is unless the orientation comes first: it may come last.
      turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
      if turned and image.format == "TIFF":  # which Pillow turns when it reads it, and newer ones its size before
        image.load()
        turned = False
      return image.size if turned else image.size[::-1]

  def _image(self, row: int) -> Image.Image:
    return pictures.read_rgb(self.folder / self.files[row].path)


class ArrayPictures(Native):
  """Pictures of one size in memory, uint8 `[n, h, w, c]`."""

  def __init__(self, images_nhwc: np.ndarray, patch: int, most_patches: int = MOST_PATCHES):
    super().__init__(patch, most_patches)
    self.images_nhwc = images_nhwc

  def __len__(self) -> int:
    return len(self.images_nhwc)

  @functools.cached_property
  def sizes_n2(self) -> np.ndarray:
    return np.tile(np.array(self.images_nhwc.shape[1:3], np.int32), (len(self), 1))

  def _image(self, row: int) -> Image.Image:
    return Image.fromarray(self.images_nhwc[row])


def grid(height: int, width: int, patch: int, most_patches: int) -> tuple[int, int]:
  """Rows and columns of patches that a picture is resized to: up to whole ones, or down to `most_patches`."""
  rows, columns = -(-height // patch), -(-width // patch)
  if rows * columns <= most_patches:
    return rows, columns
  short, long = sorted((height, width))
  fewest = max(1, int(short * math.sqrt(most_patches / (height * width))))
  # Whichever of the next whole numbers of patches along the shorter side keeps the aspect better.
  pairs = [(side, min(round(side * long / short), most_patches // side)) for side in (fewest, fewest + 1)]
  pairs = [(few, many) for few, many in pairs if many >= few]
  few, many = min(pairs, key=lambda pair: abs(math.log(pair[1] * short / (pair[0] * long))))
  return (few, many) if height <= width else (many, few)


class Bucket(NamedTuple):
  """Pictures that are padded to one shape.

  Attributes:
    rows: of patches, after padding.
    columns: likewise.
    members: the pictures' rows, ascending.
  """

  rows: int
  columns: int
  members: np.ndarray


def plan(grids_n2: np.ndarray, most: int, largest: int | None = None) -> list[Bucket]:
  """At most `most` padded shapes for all pictures, the smallest first; more where `largest` forbids to join them.

  From one bucket for each grid that there is, the two whose union adds the fewest padded patches are joined until so
  few are left.

  Args:
    grids_n2: rows and columns of patches of every picture.
    most: how many shapes may be compiled.
    largest: so many patches at most has a shape that is larger than every picture in it: a wide and a high picture are
      not padded to a square that fits in no memory. None allows any.

  Raises:
    ValueError: `most` is less than 1.
  """
  if most < 1:
    raise ValueError(f"pictures must be padded to at least 1 shape, not {most}")
  grids_d2, grid_n, counts_d = np.unique(np.asarray(grids_n2).reshape(-1, 2), axis=0, return_inverse=True,
                                         return_counts=True)
  sides_2d, counts_d = grids_d2.T.astype(np.int64), counts_d.astype(np.int64)
  into_d = np.arange(len(counts_d))  # which bucket a grid is in
  for kept, gone in _unions(sides_2d, counts_d, most, largest):
    into_d[into_d == gone] = kept
  bucket_n = into_d[grid_n.reshape(-1)]
  found = [Bucket(*map(int, sides_2d[:, bucket]), np.nonzero(bucket_n == bucket)[0]) for bucket in np.unique(bucket_n)]
  return sorted(found, key=lambda bucket: (bucket.rows * bucket.columns, bucket.rows))


def _unions(sides_2d: np.ndarray, counts_d: np.ndarray, most: int, largest: int | None):
  """Yields `(kept, gone)` of one union after another; updates both arrays in place.

  Each row of the cost matrix remembers its least entry, so that a union takes time in proportion to the rows that it
  changes and not to the matrix.
  """
  distinct, never = len(counts_d), np.iinfo(np.int64).max
  alive_d = np.ones(distinct, bool)

  def costs(bucket: int) -> np.ndarray:
    area = lambda sides: sides[0] * sides[1]
    own = sides_2d[:, bucket, None]
    joined_d = area(np.maximum(sides_2d, own))
    added_d = joined_d * (counts_d + counts_d[bucket]) - area(sides_2d) * counts_d - area(own) * counts_d[bucket]
    if largest is not None:
      added_d[joined_d > np.maximum(np.maximum(area(sides_2d), area(own)), largest)] = never
    added_d[~alive_d] = never
    added_d[bucket] = never
    return added_d

  if distinct <= most:
    return
  cost_dd = np.stack([costs(bucket) for bucket in range(distinct)])
  best_d, least_d = cost_dd.argmin(1), cost_dd.min(1)
  for _ in range(distinct - most):
    kept = int(least_d.argmin())
    if least_d[kept] == never:
      return
    gone = int(best_d[kept])
    sides_2d[:, kept] = np.maximum(sides_2d[:, kept], sides_2d[:, gone])
    counts_d[kept] += counts_d[gone]
    alive_d[gone] = False
    cost_dd[kept] = cost_dd[:, kept] = costs(kept)
    cost_dd[gone] = cost_dd[:, gone] = never
    changed_d = alive_d & ((best_d == kept) | (best_d == gone) | (cost_dd[:, kept] < least_d))
    changed_d[kept] = True
    best_d[changed_d], least_d[changed_d] = cost_dd[changed_d].argmin(1), cost_dd[changed_d].min(1)
    least_d[gone] = never
    yield kept, gone
