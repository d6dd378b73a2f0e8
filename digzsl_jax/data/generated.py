"""Generated images on disk: `<folder>/manifest.json` and the PNG files that it lists.

The manifest holds "classes" (names), "images" (of each class), "sources", and "files": for each source
and class name the paths of its images relative to the manifest's folder.

Shapes: n image, h w pixel, c colour channel (RGB).
"""

import pathlib
from collections.abc import Iterator, Sequence

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


def batches(folder: pathlib.Path, manifest: dict, source: str, names: Sequence[str],
            size: int = 256) -> Iterator[np.ndarray]:
  """uint8 `[n, h, w, c]`, n up to `size`: all images of the first name, then of the second, and so on.

  Raises:
    ValueError: a missing or damaged image; the message names its file.
  """
  paths = [folder / path for name in names for path in manifest["files"][source][name]]
  for start in range(0, len(paths), size):
    yield np.stack([images.read_png(path) for path in paths[start:start + size]])
