"""Small data sets as TFDS prepares them, made without TensorFlow or network: the features are those of its builders."""

import contextlib
import os

import numpy as np
import pytest
import scipy.io

from digzsl_jax.data import benchmarks
from tests import small_archive

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


def prepare(data_dir, builder, version, features, parts):
  """`parts`: lists of examples, their images as the bytes of a file: arrays would need TensorFlow."""
  methods = {
      "VERSION": tfds.core.Version(version),
      "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features)),
      "_split_generators": lambda self, _: {part: enumerate(rows) for part, rows in parts.items()},
      "_generate_examples": None}
  with tfds.core.registered.skip_registration():
    made = type(builder, (tfds.core.GeneratorBasedBuilder,), methods)
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
    made(data_dir=data_dir, file_format="array_record").download_and_prepare()


def cub(data_dir, images):
  """As caltech_birds2011, the picture files of the folder `images`."""
  features = {
      "image": tfds.features.Image(), "image/filename": tfds.features.Text(), "label_name": tfds.features.Text(),
      "label": tfds.features.ClassLabel(num_classes=200), "bbox": tfds.features.BBoxFeature(),
      "segmentation_mask": tfds.features.Image(shape=(None, None, 1))}
  rows = [{"image": path.read_bytes(), "image/filename": f"CUB_200_2011/images/{path.parent.name}/{path.name}",
           "label": int(path.parent.name[:3]) - 1, "label_name": path.parent.name[4:].lower(),
           "bbox": tfds.features.BBox(0., 0., 1., 1.), "segmentation_mask": b"is never decoded"}
          for path in sorted(images.glob("*/*.jpg"))]
  prepare(data_dir, "CaltechBirds2011", "0.2.0", features, {"train": rows[::2], "test": rows[1::2]})


def flo(data_dir, folder):
  """As oxford_flowers102, the files of FLO's `folder`."""
  names = list(benchmarks.published_classes("FLO"))
  names[names.index("lotus lotus")] = "lotus"  # as TFDS spells it
  features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names),
              "file_name": tfds.features.Text()}
  labels, parts = (scipy.io.loadmat(folder / file) for file in ("imagelabels.mat", "setid.mat"))
  of = lambda image: {"image": (folder / "jpg" / f"image_{image:05}.jpg").read_bytes(),
                      "file_name": f"image_{image:05}.jpg", "label": int(labels["labels"][0, image - 1]) - 1}
  prepare(data_dir, "OxfordFlowers102", "2.1.1", features,
          {part: [of(image) for image in parts[key][0].tolist()]
           for part, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid"))})


def flo_folder(folder, write_picture):
  """FLO's own files and a small archive: two images of a seen class, one of an unseen one."""
  rng = np.random.default_rng(0)
  classes = benchmarks.published_classes("FLO")
  unseen_k = np.array([part == "unseen" for part in classes.values()])
  labels_n = rng.permutation(np.concatenate([np.arange(len(classes)), np.flatnonzero(~unseen_k)]))
  order_n = rng.permutation(len(labels_n))
  for i in range(len(labels_n)):
    write_picture(folder / "jpg" / f"image_{i + 1:05}.jpg", i)
  scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels_n[None] + 1})
  pieces = np.split(order_n + 1, (50, 100))
  scipy.io.savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), pieces)))
  first = np.zeros(len(labels_n), bool)
  first[np.unique(labels_n[order_n], return_index=True)[1]] = True
  unseen_n = unseen_k[labels_n[order_n]]
  rows = {"trainval_loc": ~unseen_n & ~first, "test_seen_loc": ~unseen_n & first, "test_unseen_loc": unseen_n}
  small_archive.write(folder, {loc: np.flatnonzero(chosen)[:, None] + 1 for loc, chosen in rows.items()})
  return folder
