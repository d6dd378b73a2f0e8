"""The engine of TagCLIP against its stages one picture at a time, on random models."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from digzsl_jax import tagger
from digzsl_jax.data import native
from digzsl_jax.models import cdm, clip, hub, tagclip
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


@pytest.fixture(scope="module")
def planned():
  read = pictures()
  return read, native.plan(read.grids_n2, 2)


@pytest.mark.parametrize("compat", [False, True])
def test_engine(model, planned, compat):
  read, buckets = planned
  rows, found, looks = run(model, read, buckets, RULES._replace(compat=compat), pictures=2, crops=3,
                           devices=jax.devices()[:1])
  wanted, wanted_looks = by_stages(model, read, compat)
  assert looks == wanted_looks > 5
  assert rows.tolist() == np.concatenate([bucket.members for bucket in buckets]).tolist()
  for mine, theirs in zip(found, wanted, strict=True):
    assert mine.dtype == np.float32
    small.close(mine, theirs)
  assert (found[1] != found[2]).sum() == looks


def test_devices_change_no_bit(model, planned):
  read, buckets = planned[0], native.plan(planned[0].grids_n2, 1)
  options = dict(pictures=1, crops=2)
  rows, wanted, looks = run(model, read, buckets, devices=jax.devices()[:1], **options)
  for devices in (2, 4):
    again = run(model, read, buckets, devices=jax.devices()[:devices], **options)
    assert again[0].tolist() == rows.tolist() and again[2] == looks
    for mine, theirs in zip(again[1], wanted):
      np.testing.assert_array_equal(mine, theirs)


def test_buckets_and_batches_change_nothing(model, planned):
  read, buckets = planned
  one_bucket = native.plan(read.grids_n2, 1)
  _, wanted, looks = run(model, read, buckets, pictures=2, crops=3, devices=jax.devices()[:1])
  _, found, again = run(model, read, one_bucket, pictures=1, crops=2, devices=jax.devices()[:1])
  assert looks == again
  for mine, theirs in zip(found, wanted):
    small.close(mine, theirs)


def test_one_compilation_of_each_call_for_a_bucket(model, planned):
  read, buckets = planned
  counts = lambda: np.array([call._cache_size() for call in (tagger._first, tagger._second)])
  before, options = counts(), dict(pictures=4, crops=6, devices=jax.devices()[:1])  # no other test's
  run(model, read, buckets, **options)
  assert (counts() - before).tolist() == [len(buckets)] * 2
  run(model, read, buckets, **options)
  assert (counts() - before).tolist() == [len(buckets)] * 2


def test_memory_does_not_grow_with_layers():
  def temporary(layers):
    vision = small.SMALL["vision_config"] | {"num_hidden_layers": layers}
    graphdef, state = nnx.split(hub.abstract(clip.CLIPModel, small.SMALL | {"vision_config": vision}))
    call = jax.jit(lambda state, *inputs: tagclip.scores_and_affinity(nnx.merge(graphdef, state), *inputs,
                                                                      first_layer=0, votes=2))
    shapes = (2, 256, 256, 3), (2, 2), (9, 24)
    inputs = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, (np.float32, np.int32, np.float32))]
    return call.lower(state, *inputs).compile().memory_analysis().temp_size_in_bytes

  assert temporary(8) - temporary(3) < 2 * 4 * 256**2  # not one attention map of both pictures


def test_nothing_to_do(model, planned):
  engine = tagger.Tagger(model, PREPROCESS, small.make_texts(24), small.LABELS, RULES)
  assert list(engine.stream(planned[0], [])) == []


def test_bfloat16(model, planned):
  graphdef, state = nnx.split(hub.abstract(clip.CLIPModel, small.SMALL, dtype="bfloat16"))
  low = nnx.merge(graphdef, jax.tree.map(lambda leaf, wanted: np.asarray(leaf).astype(wanted.dtype), nnx.state(model),
                                         state))
  read, buckets = planned
  options = dict(pictures=2, crops=3, devices=jax.devices()[:1])
  (_, wanted, _), (_, found, _) = run(model, read, buckets, **options), run(low, read, buckets, **options)
  for mine in found:
    assert mine.dtype == np.float32 and np.isfinite(mine).all()
  assert 0 < np.abs(found[0] - wanted[0]).max() < 0.1  # later stages may choose otherwise


def test_pictures_that_cannot_be_read(model, planned):
  class Damaged(Sized):
    def _image(self, row):
      if row == 6:
        raise ValueError("x.jpg cannot be read")
      return super()._image(row)

  read = Damaged(planned[0].images)
  engine = tagger.Tagger(model, PREPROCESS, small.make_texts(24), small.LABELS, RULES, pictures=2, crops=3,
                         devices=jax.devices()[:1])
  with pytest.raises(ValueError, match="x.jpg cannot be read"):
    list(engine.stream(read, planned[1]))


def test_errors(model):
  make = lambda text_kp=None, labels=6, rules=RULES, **options: tagger.Tagger(
      model, PREPROCESS, small.make_texts(24) if text_kp is None else text_kp, labels, rules, **options)
  with pytest.raises(ValueError, match=r"texts \[9, 23\] with 6 labels do not fit a model of width 24"):
    make(small.make_texts(23))
  with pytest.raises(ValueError, match="with 10 labels do not fit"):
    make(labels=10)
  with pytest.raises(ValueError, match="first_layer 8 and votes 4 do not fit a model of 5 layers"):
    make(rules=tagger.Rules())
  with pytest.raises(ValueError, match="pictures 0 and crops 4 of a batch must be at least 1"):
    make(pictures=0)


def test_rules_for_other_depths():
  rules = tagger.Rules.for_layers
  assert [rules(layers)[:2] for layers in (12, 24, 4, 3, 2)] == [(8, 4), (16, 8), (2, 1), (1, 1), (0, 1)]
  assert rules(12) == tagger.Rules() and rules(12, 0.1, True) == tagger.Rules(8, 4, 0.1, True)
