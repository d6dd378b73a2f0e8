"""Scenes with several labels: a label is a class of `scenes`, a picture holds one to four objects.

Shapes: n image, o object of an image, h w pixel, k label.
"""

import numpy as np

from digzsl_jax.data import scenes
from digzsl_jax.data.tagged import MultilabelDataset, Tagged

_TRAIN, _TEST = 7, 8  # streams of the seed


def load(*, world: int = 0, train: int = 4800, test: int = 960, seed: int = 0, max_objects: int = scenes.MAX_OBJECTS,
         size: int = 32) -> MultilabelDataset:
  """Pictures in target style of all 108 classes of `scenes`: 12 are unseen, which ones `world` says, 96 are seen.

  Picture i holds 1 + i % `max_objects` objects of different classes. Training pictures show seen classes alone: nothing
  unseen is ever there. Test pictures draw on all, and no label has more than one positive more than another, as a
  label's share of positives is what chance makes of its average precision. So about a quarter of the test pictures hold
  an unseen class.

  Args:
    world: as in `scenes.class_lists`.
    train: number of training pictures.
    test: number of test pictures.
    seed: of labels and pictures.
    max_objects: most objects of a picture, 1 to 4.
    size: height and width in pixels.

  Raises:
    ValueError: a number out of range.
  """
  for field, value in (("train", train), ("test", test), ("size", size)):
    if value < 1:
      raise ValueError(f"{field} is {value}; it must be at least 1")
  seen, unseen = _lists(world)
  names = tuple(scenes.NAMES[label] for label in (*seen, *unseen))

  def tagged(count: int, labels: int, stream: int) -> Tagged:
    columns_no = _draw(count, labels, max_objects, (seed, stream))
    images_nhwc, _ = _render(columns_no, world, (seed, stream), size)
    targets_nk = np.zeros((count, len(names) + 1), np.int8)
    np.put_along_axis(targets_nk, columns_no, 1, axis=1)  # -1, no object, is the last column
    return Tagged(images_nhwc, targets_nk[:, :-1].copy())

  return MultilabelDataset(f"multilabel-scenes{world}", names, tuple(range(len(seen))),
                           tuple(range(len(seen), len(names))), tagged(train, len(seen), _TRAIN),
                           tagged(test, len(names), _TEST))


def masks(*, world: int = 0, test: int = 960, seed: int = 0, max_objects: int = scenes.MAX_OBJECTS,
          size: int = 32) -> np.ndarray:
  """`[n, h, w]`, int8: the label (column) that each pixel of the test pictures shows, -1 for the background.

  The arguments are those of `load`, for the same pictures.
  """
  seen, unseen = _lists(world)
  columns_no = _draw(test, len(seen) + len(unseen), max_objects, (seed, _TEST))
  _, masks_nohw = _render(columns_no, world, (seed, _TEST), size)
  shown_nhw = np.full((test, size, size), -1, np.int8)
  for o in range(max_objects):  # a pixel shows one object
    shown_nhw += masks_nohw[:, o] * (columns_no[:, o, None, None] + 1).astype(np.int8)
  return shown_nhw


def _lists(world: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  unseen = scenes.class_lists(world)["unseen"]
  return tuple(label for label in range(len(scenes.NAMES)) if label not in unseen), unseen


def _draw(n: int, labels: int, max_objects: int, seed: tuple[int, int]) -> np.ndarray:
  """`[n, o]` columns below `labels`, -1 for no object: each picture takes the least used ones, drawn among equals."""
  if not 1 <= max_objects <= scenes.MAX_OBJECTS:
    raise ValueError(f"max_objects is {max_objects}; a scene holds 1 to {scenes.MAX_OBJECTS} objects")
  rng = np.random.default_rng((*seed, 1))
  columns_no, used_k = np.full((n, max_objects), -1), np.zeros(labels, int)
  for i in range(n):
    count = 1 + i % max_objects
    columns_no[i, :count] = chosen = np.argsort(used_k + rng.random(labels))[:count]
    used_k[chosen] += 1
  return columns_no


def _render(columns_no: np.ndarray, world: int, seed: tuple[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
  """As `scenes.render`, objects by column."""
  seen, unseen = _lists(world)
  attributes = scenes.attributes(np.array((*seen, *unseen))[columns_no])
  textures_no, colours_no, shapes_no = (np.where(columns_no < 0, -1, numbers_no) for numbers_no in attributes)
  return scenes.render(shapes_no, colours_no, textures_no, seed=seed, style="target", size=size)
