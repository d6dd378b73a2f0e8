"""Pictures whose pixels are numbers of labels: palette or grey PNG.

Shapes: h w pixel, v value of a file.
"""

from importlib.resources.abc import Traversable

import numpy as np
from PIL import Image

from digzsl_jax.data.images import UNREADABLE

BACKGROUND, NOT_JUDGED, UNKNOWN = -1, -2, -3  # in place of a label's column


def read(path: Traversable, columns_v: np.ndarray) -> np.ndarray:
  """`[h, w]`, int16: what `columns_v`, `[256]`, makes of the file's values.

  Raises:
    ValueError: no such file, a damaged one, one of colours, or a value that `columns_v` takes for `UNKNOWN`.
  """
  try:
    with path.open("rb") as file, Image.open(file) as image:
      mode, values_hw = image.mode, np.asarray(image)
  except FileNotFoundError as error:
    raise ValueError(f"there is no mask {path}; get it again, or take the image off the list") from error
  except UNREADABLE as error:
    raise ValueError(f"{path} is truncated or no picture ({error}); get it again") from error
  if mode not in ("P", "L"):
    raise ValueError(f"{path} holds colours (mode {mode}), but a mask holds numbers of labels, as palette or grey PNG; "
                     "get the original file")
  columns_hw = np.take(columns_v.astype(np.int16), values_hw)
  if columns_hw.min(initial=0) == UNKNOWN:
    raise ValueError(f"{path} has the value {values_hw[columns_hw == UNKNOWN][0]}, which is no label; get the original "
                     "file")
  return columns_hw
