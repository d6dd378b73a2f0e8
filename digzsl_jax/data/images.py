"""Picture files.

Shapes: h w pixel, c colour channel (RGB).
"""

import collections
import concurrent.futures
import os
from collections.abc import Mapping

import numpy as np
from PIL import Image, PngImagePlugin

from digzsl_jax.files import write_atomic

THREADS = 4  # that compress pictures; Pillow lets others run meanwhile

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files


def read_png(path: str | os.PathLike) -> np.ndarray:
  """uint8 RGB `[h, w, c]` of a picture file, whatever its mode; transparency is dropped.

  Raises:
    ValueError: missing, truncated or undecodable file.
  """
  try:
    with Image.open(path) as image:
      return np.array(image.convert("RGB"))
  except FileNotFoundError as error:
    raise ValueError(f"no image file {path}; restore it, or run the stage that makes it again") from error
  except UNREADABLE as error:
    raise ValueError(f"{path} is truncated or no image ({error}); delete it and run the stage that makes it "
                     "again, or fetch it again") from error


def read_text(path: str | os.PathLike) -> dict[str, str]:
  """What `write_png` wrote beside the pixels.

  Raises:
    ValueError: as `read_png`.
  """
  try:
    with Image.open(path) as image:
      image.load()
      return dict(image.text)
  except (OSError, SyntaxError, ValueError, AttributeError) as error:
    raise ValueError(f"{path} is truncated or no PNG ({error}); delete it, and it is made again") from error


def write_png(path: str | os.PathLike, image_hwc: np.ndarray, text: Mapping[str, str] | None = None) -> None:
  """Writes uint8 RGB `[h, w, c]` atomically: readers see the old file or the whole new one.

  `text` goes into the file beside the pixels, as PNG's `iTXt`.
  """
  if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[-1] != 3:
    raise ValueError(f"{path}: a picture is uint8 [h, w, 3], not {image_hwc.dtype} {list(image_hwc.shape)}")
  said = PngImagePlugin.PngInfo()
  for name, value in (text or {}).items():
    said.add_itxt(name, value)
  write_atomic(path, lambda temporary: Image.fromarray(image_hwc).save(temporary, format="PNG", pnginfo=said))


class Writer:
  """`write_png` in other threads, so that what makes the pictures need not wait; after `with` all are written.

  A picture that could not be written ends `with`, or a later `write`, with `write_png`'s error.
  """

  def __init__(self):
    self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "pictures")
    self._under_way = collections.deque()

  def write(self, path: str | os.PathLike, image_hwc: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Takes the arguments of `write_png`; waits while much is under way."""
    self._under_way.append(self._threads.submit(write_png, path, image_hwc, text))
    while len(self._under_way) > 16 * THREADS:
      self._under_way.popleft().result()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, *_) -> None:
    self._threads.shutdown()
    if kind is None:
      for written in self._under_way:
        written.result()
