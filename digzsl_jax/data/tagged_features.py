"""Multi-label data whose images come as features that another encoder made.

    features/names.txt       a label on each line, in the order of the columns of targets
    features/unseen.txt      those of them that are unseen; may be absent
    features/train.npy       [n, t, e] or [n, e], a floating type: t positions of an image, one if there is no t
    features/train_targets.npy   [n, k], int8: 1 present, 0 absent, -1 not judged
    features/test.npy, features/test_targets.npy

Features stay on disk until a batch needs them.

Shapes: n image, t position, e feature, k label.
"""

import pathlib

import numpy as np

from digzsl_jax.data import tagged_files
from digzsl_jax.data.tagged import MultilabelDataset, Tagged


def load(*, folder: str) -> MultilabelDataset:
  """The data set of the files above.

  Raises:
    ValueError: a file that is missing, damaged or misshapen, or an unseen label that is none.
  """
  root = pathlib.Path(folder).expanduser()
  names = tagged_files.read_names(root / "names.txt", "the names of the labels")
  path = root / "unseen.txt"
  unseen = tagged_files.read_names(path, "the names of the unseen labels", names) if path.exists() else []
  parts = {part: _read(root, part, len(names)) for part in ("train", "test")}
  if (widths := {part: tagged.images_nhwc.shape[1:] for part, tagged in parts.items()})["train"] != widths["test"]:
    raise ValueError(f"{root}: features of an image are {list(widths['train'])} in train.npy, but "
                     f"{list(widths['test'])} in test.npy; make both with the same encoder")
  return MultilabelDataset(root.name, tuple(names), *tagged_files.divided(names, unseen), **parts)


def _read(root: pathlib.Path, part: str, labels: int) -> Tagged:
  features, targets_nk = (_array(root / f"{part}{ending}.npy") for ending in ("", "_targets"))
  if features.ndim == 2:
    features = features[:, None]
  if features.ndim != 3 or features.dtype.kind != "f":
    raise ValueError(f"{root / part}.npy is {features.dtype} {list(features.shape)}; features are floating numbers "
                     "[images, positions, width] or [images, width]")
  if targets_nk.dtype != np.int8 or targets_nk.shape != (len(features), labels):
    raise ValueError(f"{root / part}_targets.npy is {targets_nk.dtype} {list(targets_nk.shape)}; for {len(features)} "
                     f"images and the {labels} labels of names.txt it must be int8 [{len(features)}, {labels}]")
  return Tagged(features, np.array(targets_nk))


def _array(path: pathlib.Path) -> np.ndarray:
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False)
  except FileNotFoundError as error:
    raise ValueError(f"there is no {path}; numpy.save writes it") from error
  except (ValueError, EOFError, OSError) as error:
    raise ValueError(f"{path} is no array of numpy ({error}); write it with numpy.save") from error
