"""Picture files, read when their pixels are needed.

Shapes: n image, h w pixel, c colour channel (RGB).
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import numpy as np
import tqdm
from PIL import Image, ImageOps, UnidentifiedImageError

from digzsl_jax import resize
from digzsl_jax.data.images import UNREADABLE

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB\x60\x82"}  # the last bytes of a whole file
_EDGE = 4096  # bytes of a file's beginning and end that tell it from others


class File(NamedTuple):
  """A picture file that was found whole."""
  path: str
  digest: bytes  # SHA-256 of size, beginning and end


class Pictures:
  """Picture files in place of a uint8 array `[n, size, size, 3]`: `[rows]` decodes, in several threads.

  A picture of any size and mode is turned as its EXIF orientation says, becomes RGB (transparency is dropped, 16-bit
  grey is cut to 8) and then a square as `fit` says, with antialias. "crop", CLIP's way: resized to `size` along its
  shorter side (bicubic), it loses what is outside the central square. "squash", the way of ML-Decoder and BiAM: both
  sides are resized to `size` (bilinear), and no label is cut off. JPEGs are decoded at full size: a reduced decode
  changes the result by up to 41 of 255.
  """

  dtype, ndim = np.dtype(np.uint8), 4

  def __init__(self, folder: Traversable, files: Sequence[File], size: int, fit: str = "crop"):
    """`folder` is what the files' paths are relative to: a `pathlib.Path`, or what joins and opens as one does."""
    self.folder, self.files, self.size, self.fit = folder, tuple(files), size, fit

  def __len__(self) -> int:
    return len(self.files)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return len(self), self.size, self.size, 3

  def take(self, rows: np.ndarray | slice) -> "Pictures":
    """The pictures of `rows`, indices or a mask, without reading them."""
    return Pictures(self.folder, [self.files[row] for row in np.arange(len(self))[rows]], self.size, self.fit)

  def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
    """Pixels `[h, w, c]` of a picture, or `[n, h, w, c]` of several.

    Raises:
      ValueError: a file is missing or damaged.
    """
    if np.ndim(chosen := np.arange(len(self))[rows]) == 0:
      return decode(self.folder / self.files[chosen].path, self.size, self.fit)
    pixels_nhwc = np.empty((len(chosen), *self.shape[1:]), np.uint8)

    def fill(place: int, row: int) -> None:
      pixels_nhwc[place] = decode(self.folder / self.files[row].path, self.size, self.fit)

    list(_threads().map(fill, range(len(chosen)), chosen))
    return pixels_nhwc

  @property
  def fingerprint(self) -> bytes:
    """SHA-256 of paths, sizes, and the first and last 4096 bytes of every file; of `fit` too unless it is "crop".

    In a compressed picture a change in the middle moves or alters what follows, so edges and size differ as soon as
    pixels do; PNG even ends with a checksum.
    """
    digest = hashlib.sha256(b"" if self.fit == "crop" else self.fit.encode())
    for path, content in self.files:
      digest.update(path.encode() + b"\0" + content)
    return digest.digest()


def find(given: Iterable[str]) -> list[pathlib.Path]:
  """Files as they are, and of folders all pictures below them, sorted.

  Raises:
    ValueError: there is no such file or folder, or a folder holds no pictures.
  """
  found = []
  for path in map(pathlib.Path, given):
    if not path.exists():
      raise ValueError(f"there is no file or folder {path}")
    if not path.is_dir():
      found.append(path)
      continue
    inside = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not inside:
      raise ValueError(f"the folder {path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    found += inside
  return found


def scan(folder: Traversable, paths: Iterable[str]) -> tuple[list[File], dict[str, str]]:
  """Looks at every file without decoding it where its beginning and end show that it is whole.

  Args:
    folder: as in `Pictures`.
    paths: relative to `folder`.

  Returns:
    the whole files in the order of `paths`, and by path what is wrong with the others.
  """
  def look(path: str) -> File | str:
    try:
      return File(path, _examine(folder / path))
    except UNREADABLE as error:
      return _reason(error)

  paths = list(paths)
  found = dict(zip(paths, in_threads(look, paths, "looking at pictures")))
  return ([file for file in found.values() if isinstance(file, File)],
          {path: wrong for path, wrong in found.items() if isinstance(wrong, str)})


def in_threads(call: Callable[[Any], Any], items: Sequence, name: str) -> list:
  """What `call` gives for each of `items`; work of more than two seconds shows a progress bar of that name."""
  # When not a terminal, a line a minute.
  return list(tqdm.tqdm(_threads().map(call, items), name, len(items), delay=2, leave=False, dynamic_ncols=True,
                        file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 60))


def decode(path: Traversable, size: int, fit: str = "crop") -> np.ndarray:
  """Pixels `[size, size, 3]` of a picture file, as `Pictures` says.

  Raises:
    ValueError: it is missing or damaged.
  """
  image = read_rgb(path)
  if fit == "squash":
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
  height, width, top, left = resize.fit(image.height, image.width, size, size)
  if (width, height) != image.size:
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def read_rgb(path: Traversable, enough: int | None = None) -> Image.Image:
  """A picture file as it is shown: turned, RGB, of its own size.

  Args:
    enough: where it is given, a JPEG may be decoded at a reduced size, neither side shorter than this; that is quick.

  Raises:
    ValueError: it is missing or damaged.
  """
  with opened(path) as image:
    if enough:
      image.draft(None, (enough, enough))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # which Pillow would clip to white
      image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@contextlib.contextmanager
def opened(path: Traversable) -> Iterator[Image.Image]:
  """A picture file, of which Pillow has read no more than the beginning.

  Raises:
    ValueError: it is missing or damaged, found here or in the body.
  """
  try:
    with path.open("rb") as file, Image.open(file) as image:
      yield image
  except UNREADABLE as error:
    raise ValueError(f"{path} cannot be read ({_reason(error)}); replace or delete it") from error


def _examine(path: Traversable) -> bytes:
  """Digest of a whole file; raises one of `UNREADABLE` for another."""
  with path.open("rb") as file:
    first = file.read(_EDGE)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _EDGE))
    last = file.read()
    file.seek(0)
    with Image.open(file) as image:
      end = _ENDS.get(image.format)
      if not end or not last.endswith(end):
        image.load()
  return hashlib.sha256(b"%d\0" % size + first + last).digest()


def _reason(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return "there is no such file"
  return "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error)


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  """Pillow decodes and resizes outside Python's lock, so threads are enough."""
  return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "pictures")
