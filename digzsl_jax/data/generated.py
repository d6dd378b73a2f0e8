"""Generated images on disk: `<folder>/manifest.json` and the PNG files that it lists.

The manifest holds "classes" (names), "images" (of each class), "sources", and "files": for each source
and class name the paths of its images relative to the manifest's folder.

Shapes: n image, h w pixel, c colour channel (RGB).
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from digzsl_jax import files
from digzsl_jax.data import images


def read_manifest(folder: pathlib.Path, names: Sequence[str]) -> dict:
  """The manifest of a task's images, checked to hold every class of `names`.

  Raises:
    ValueError: missing or damaged manifest, or a class with too few images.
  """
  path = folder / "manifest.json"
  if not path.exists():
    raise ValueError(f"{path} is missing; stage generate writes it again")
  manifest = files.read_json(path)
  for source, of_source in manifest["files"].items():
    if lacking := [name for name in names if len(of_source.get(name, ())) != manifest["images"]]:
      raise ValueError(f"{path} does not list {manifest['images']} {source} images of {', '.join(lacking)}; delete "
                       "it, and stage generate makes what is missing and writes it again")
  return manifest


class Images:
  """uint8 `[n, h, w, c]`: all images of the first name, then of the second, and so on; read when they are asked for."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self.paths = list(paths)

  @classmethod
  def of(cls, folder: pathlib.Path, manifest: dict, source: str, names: Sequence[str]) -> "Images":
    """Those of a source that the manifest of `folder` lists."""
    return cls([folder / path for name in names for path in manifest["files"][source][name]])

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Raises ValueError for a missing or damaged image; the message names its file."""
    return np.stack([images.read_png(path) for path in self.paths[rows]])

  def take(self, rows: np.ndarray) -> "Images":
    return Images([self.paths[row] for row in rows])
