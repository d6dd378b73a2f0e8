"""Random weights of convolutional networks, the same with and without PyTorch, and pictures for them."""

import re
import zlib
from collections.abc import Mapping

import numpy as np


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """By the checkpoint's names: activations stay of order 1, and no statistic is a neutral 0 or 1."""
  tensors = {}
  for name, shape in shapes.items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
      tensors[name] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    elif re.search(r"(running_var|(bn|norm\d)\.weight)$", name):
      tensors[name] = rng.uniform(0.8, 1.25, shape)
    else:
      tensors[name] = rng.normal(0, 0.1, shape)
  return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def photographs(height: int, width: int) -> np.ndarray:
  """uint8 `[2, height, width, 3]`: edges, and noise on them."""
  rng = np.random.default_rng(0)
  i, j = np.mgrid[:height, :width]
  waves = [i / rng.uniform(3, 30) + j / rng.uniform(3, 30) for _ in range(6)]
  bands = np.sin(waves).reshape(2, 3, height, width).transpose(0, 2, 3, 1) > 0
  return (150 * bands + rng.integers(0, 105, 3) + rng.normal(0, 12, bands.shape)).clip(0, 255).astype(np.uint8)
