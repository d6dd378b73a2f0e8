"""Picture files.

Shapes: h w pixel, c colour channel (RGB).
"""

import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from digzsl_jax.files import write_atomic


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
  except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
    raise ValueError(f"{path} is truncated or no image ({error}); delete it and run the stage that makes it "
                     "again, or fetch it again") from error


def write_png(path: str | os.PathLike, image_hwc: np.ndarray) -> None:
  """Writes uint8 RGB `[h, w, c]` atomically: readers see the old file or the whole new one."""
  if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[-1] != 3:
    raise ValueError(f"{path}: a picture is uint8 [h, w, 3], not {image_hwc.dtype} {list(image_hwc.shape)}")
  write_atomic(path, lambda temporary: Image.fromarray(image_hwc).save(temporary, format="PNG"))
