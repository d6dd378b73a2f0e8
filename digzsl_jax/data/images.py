"""Pictures: files, number ranges, grids.

Shapes: n image, h w pixel, c colour channel (RGB).
"""

import os
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError


def read_png(path: str | os.PathLike) -> np.ndarray:
  """uint8 RGB `[h, w, c]` of a picture file, whatever its mode; transparency is dropped.

  Raises:
    ValueError: missing, truncated or undecodable file.
  """
  try:
    with Image.open(path) as image:
      return np.array(image.convert("RGB"))
  except FileNotFoundError as error:
    raise ValueError(f"no image file {path}; restore it, or run the stage that writes it again") from error
  except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
    raise ValueError(f"{path} is truncated or no image ({error}); delete it and run the stage that writes it "
                     "again, or fetch it again") from error


def write_png(path: str | os.PathLike, image_hwc: np.ndarray) -> None:
  """Writes uint8 RGB `[h, w, c]` atomically: readers see the old file or the whole new one."""
  if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[-1] != 3:
    raise ValueError(f"{path}: a picture is uint8 [h, w, 3], not {image_hwc.dtype} {list(image_hwc.shape)}")
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    Image.fromarray(image_hwc).save(temporary, format="PNG")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def to_float(images: np.ndarray) -> np.ndarray:
  """uint8 0..255 to float32 -1..1, any shape."""
  if images.dtype != np.uint8:
    raise ValueError(f"to_float takes uint8 images, not {images.dtype}")
  return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Floats -1..1, clipped there, to the nearest uint8; the inverse of `to_float`."""
  return np.clip(np.rint((np.asarray(images, np.float32) + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def grid(images_nhwc: np.ndarray, columns: int, pad: int = 2, fill: int = 255) -> np.ndarray:
  """One picture `[h, w, c]` of all, row by row, `pad` pixels of grey level `fill` around each."""
  n, h, w, c = images_nhwc.shape
  rows = -(-n // columns)
  sheet = np.full((rows, h + pad, columns, w + pad, c), fill, images_nhwc.dtype)
  cells = np.full((rows * columns, h, w, c), fill, images_nhwc.dtype)
  cells[:n] = images_nhwc
  sheet[:, :h, :, :w] = cells.reshape(rows, columns, h, w, c).swapaxes(1, 2)
  sheet = sheet.reshape(rows * (h + pad), columns * (w + pad), c)
  return np.pad(sheet, ((pad, 0), (pad, 0), (0, 0)), constant_values=fill)


def upscale(images: np.ndarray, factor: int) -> np.ndarray:
  """Each pixel `factor` times in height and width, so that small pictures stay crisp; `[..., h, w, c]`."""
  return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
