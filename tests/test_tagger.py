"""The engine of TagCLIP against its stages one picture at a time, on random models."""

import jax
import numpy as np
import pytest
from PIL import Image

from digzsl_jax import tagger
from digzsl_jax.data import native
from digzsl_jax.models import cdm
from tests import test_tagclip as small

PREPROCESS = cdm.Preprocess(64, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
RULES = tagger.Rules(first_layer=1, votes=3, threshold=small.THRESHOLD)
SIZES = [(64, 64), (80, 48), (33, 96), (64, 50), (96, 96), (17, 90), (64, 64), (50, 96), (96, 80), (16, 16), (70, 90)]


class Sized(native.Native):
  """Pictures in memory, each of its own size."""

  def __init__(self, images):
    super().__init__(16, 1600)
    self.images = images

  def __len__(self):
    return len(self.images)

  @property
  def sizes_n2(self):
    return np.array([image.size[::-1] for image in self.images])

  def _image(self, row):
    return self.images[row]


def pictures():
  """Spots on a ground."""
  rng = np.random.default_rng(0)
  return Sized([Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)).resize(
      (width, height)) for height, width in SIZES])


@pytest.fixture(scope="module")
def model():
  return small.make_model(small.SMALL, 20)


def run(model, read, buckets, rules=RULES, **options):
  engine = tagger.Tagger(model, PREPROCESS, small.make_texts(24), small.LABELS, rules, **options)
  batches = list(engine.stream(read, buckets))
  rows = np.concatenate([batch.rows_b for batch in batches])
  arrays = [np.concatenate([getattr(batch, name) for batch in batches]) for name in
            ("patch_bf", "refined_bf", "scores_bf")]
  return rows, [array[np.argsort(rows)] for array in arrays], sum(batch.looks for batch in batches)


def by_stages(model, read, compat=False):
  """By the functions of `tagclip` on one batch of all pictures; its own tests compare these with a plain derivation."""
  normalised = lambda pixels: ((pixels / 255 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)).astype(np.float32)
  images = [normalised(read.pixels(row)) for row in range(len(read))]
  out = small.run_all(model, images, *read.grids_n2.max(0), small.make_texts(24), **small.SETTINGS)
  patch = np.stack([small.part(out, b)(out.coarse).max(0)[:small.LABELS] for b in range(len(images))])
  return [patch, out.proposals[compat].scores_bf, small.final_scores(out, compat)], len(out.looked[compat])


def test_engine(model):
  read = pictures()
  buckets = native.plan(read.grids_n2, 2)
  rows, found, looks = run(model, read, buckets, pictures=2, crops=3, devices=jax.devices()[:1])
  wanted, wanted_looks = by_stages(model, read)
  assert looks == wanted_looks > 5
  assert rows.tolist() == np.concatenate([bucket.members for bucket in buckets]).tolist()
  for mine, theirs in zip(found, wanted):
    small.close(mine, theirs)
