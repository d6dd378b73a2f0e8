"""The multi-label data sets, by name.

Shapes: n image, k label.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from digzsl_jax.data import coco, coco_stuff, datasets, label_table, multilabel_scenes, nus_wide, tagged_features, voc
from digzsl_jax.data.pictures import Pictures
from digzsl_jax.data.tagged import MultilabelDataset, Tagged

LOADERS = {"scenes": multilabel_scenes.load, "nus_wide": nus_wide.load, "nus_wide_csv": nus_wide.load_csv,
           "coco": coco.load, "coco_stuff": coco_stuff.load, "voc": voc.load, "table": label_table.load,
           "lists": label_table.load_lists, "features": tagged_features.load}
EDGE = 2**20  # bytes of the beginning and the end of large features that tell them from others


def load(section: Mapping) -> MultilabelDataset:
  """The data set `section["name"]`, a key of `LOADERS`; the other fields go to its loader.

  No image is left out for want of labels; published protocols differ in this, and `with_any` serves those that do.

  Raises:
    ValueError: an unknown or missing name or field, or files that the loader refuses.
  """
  return datasets.call(LOADERS, section)


def with_any(tagged: Tagged, columns: Sequence[int]) -> np.ndarray:
  """Rows of the images that hold one or more labels of `columns`.

  ML-Decoder's published code trains and evaluates NUS-WIDE on these alone: of the seen labels in training, of the
  unseen ones in ZSL, of all in GZSL. BiAM and LESA keep every image. Dropping takes negatives away, so numbers of the
  two protocols do not compare.
  """
  return np.flatnonzero((tagged.targets_nk[:, columns] == 1).any(1))


def fingerprint(dataset: MultilabelDataset) -> str:
  """SHA-256 (hex) of everything in the data set: names, lists, targets, notes, image bytes or file digests."""
  digest = hashlib.sha256()
  for field in dataclasses.fields(dataset):
    value = getattr(dataset, field.name)
    digest.update(f"\0{field.name}\0".encode())
    if isinstance(value, Tagged):
      images, targets_nk = value
      digest.update(repr(images.shape).encode())
      digest.update(images.fingerprint if isinstance(images, Pictures) else _bytes(images))
      digest.update(np.ascontiguousarray(targets_nk))
    else:
      digest.update(repr(value).encode())
  return digest.hexdigest()


def summary(dataset: MultilabelDataset) -> str:
  """One line of counts, for logs."""
  sides, counts = dataset.test.images_nhwc.shape[1:3], []
  for field, (_, targets_nk) in (("train", dataset.train), ("test", dataset.test)):
    each = (targets_nk == 1).sum() / max(len(targets_nk), 1)
    counts.append(f"{field} {len(targets_nk)} with {each:.2f} labels each")
  what = "images of {}x{} pixels" if dataset.has_images else "{} features of width {} for each image"
  return (f"{dataset.name}: {len(dataset.seen)} seen labels, {len(dataset.unseen)} unseen; {what.format(*sides)}: "
          f"{', '.join(counts)}")


def _bytes(images: np.ndarray) -> bytes:
  """All of an array in memory; of features on disk, which may be many gigabytes, beginning and end."""
  if not isinstance(images, np.memmap) or images.nbytes <= 2 * EDGE:
    return np.ascontiguousarray(images).tobytes()
  flat = images.reshape(-1)
  count = EDGE // images.itemsize
  return flat[:count].tobytes() + flat[-count:].tobytes()
