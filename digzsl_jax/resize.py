"""How pictures are made smaller or larger: the one geometry and the one kernel of files and of generated images.

Files are resized by Pillow (`data.pictures`), as those who publish encoders do, and generated images by the matrices
of this module, differentiably. Pillow has the same weights, but rounds to bytes after each of its two passes.
"""

import numpy as np


def fit(height: int, width: int, shortest: int, size: int) -> tuple[int, int, int, int]:
  """Height and width with the shorter side at `shortest`, then top and left of the central crop of `size`."""
  height, width = (shortest * side // min(height, width) for side in (height, width))
  return height, width, round((height - size) / 2), round((width - size) / 2)


def weights(inputs: int, outputs: int) -> np.ndarray:
  """Bicubic interpolation with antialias along one side, as a matrix `[outputs, inputs]`, float32.

  The kernel is Keys' (1981) with a = -1/2. Where it reaches over the edge, what is inside is scaled to sum to 1.
  """
  ratio = inputs / outputs
  centres = (np.arange(outputs)[:, None] + 0.5) * ratio - 0.5
  x = np.abs(np.arange(inputs) - centres) / max(ratio, 1)  # a wider kernel where pixels become fewer
  kernel = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
  return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)
