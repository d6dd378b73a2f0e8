"""The engine of CLS-SEG against the plain derivation of plain_cls_seg.py, one picture and label at a time.

A map is scaled to its range, and where that is small so is what it is made of: float32's rounding is magnified as much.
So maps are compared as they are before that, relative to their highest sum: `Plain.steepness` says how much steeper
they get.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import segmenter
from digzsl_jax.data import native
from digzsl_jax.models import clip, hub
from tests import plain_cls_seg as plain
from tests import test_cls_seg as small
from tests.test_tagger import PREPROCESS, pictures

RULES = segmenter.MaskRules(**small.LAYERS, threshold=small.THRESHOLD)
# Labels of test_tagger's pictures: none, one, several, all, which is more than a call has room for.
SAID = [[0, 3], [2], [], [1, 4, 5], [0], [0, 1, 2, 3, 4, 5], [], [5], [2, 4], [1], [1, 3]]
TAGS = np.array([[label in labels for label in range(small.LABELS)] for labels in SAID])
TEXTS = small.make_texts(24)
BOUND = 2e-6


def make_model():
  return small.sharp_model(small.SMALL, 20)


@pytest.fixture(scope="module")
def model():
  return make_model()


@pytest.fixture(scope="module")
def read():
  return pictures()


def engine(model, rules=RULES, **options):
  options = {"pictures": 2, "pairs": 4, "devices": jax.devices()[:1], **options}
  return segmenter.Segmenter(model, PREPROCESS, TEXTS, small.LABELS, rules, **options)


def run(model, read, shapes, **options):
  """Of each picture, padded to at most so many shapes."""
  found = list(engine(model, **options).stream(read, native.plan(read.grids_n2, shapes), TAGS))
  assert sorted(cams.row for cams in found) == list(range(len(read)))
  return sorted(found, key=lambda cams: cams.row)


@pytest.fixture(scope="module")
def found(model, read):
  return run(model, read, 2)


class Plain(NamedTuple):
  """By the plain derivation: maps `[m, i, j]`, refined and raw, and how steep each is before it is scaled, `[m]`."""

  maps: tuple[np.ndarray, np.ndarray]
  steepness: tuple[np.ndarray, np.ndarray]


@functools.cache
def plain_maps(compat=False):
  """Of each picture."""
  model, read = make_model(), pictures()
  twin = small.exact_model(model, small.SMALL)
  return [plain_of(twin, read.pixels(row), small.positions_of(model, *grid), SAID[row], grid, compat)
          for row, grid in enumerate(read.grids_n2)]


def plain_of(twin, pixels, positions, labels, grid, compat):
  normalised = ((pixels / 255 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)).astype(np.float32)
  hidden, attention = plain.features(twin, normalised, positions)
  affinity = plain.affinity(attention, **small.LAYERS)
  allowed = [k for k in range(small.CLASSES) if k in labels or k >= small.LABELS]
  rows = []
  for label in labels:
    last = plain.LastLayer(twin, hidden, TEXTS, allowed)
    activations = last.activations()
    last.forward(activations)
    weights = last.backward(label)[1:].mean(0)
    sums = np.maximum(activations[1:] @ weights, 0)
    raw = plain.cam(twin, hidden, TEXTS, allowed, label)
    spread = plain.spread(raw, affinity, *grid, small.THRESHOLD, compat)
    highest = (np.abs(activations[1:]) @ np.abs(weights)).max()
    rows.append((plain.relative(spread), raw, np.ptp(spread) / max(spread.max(), 1e-9), np.ptp(sums) / highest))
  refined, raw, *steepness = (np.array([row[part] for row in rows]) for part in range(4))
  return Plain(tuple(maps.reshape(-1, *grid) for maps in (refined, raw)), tuple(steepness))


def close(one, other, steepness, bound=BOUND):
  for mine, theirs, steep_m in zip(one, other, steepness, strict=True):
    assert mine.shape == theirs.shape
    small.close(mine * steep_m[:, None, None], theirs * steep_m[:, None, None], bound)


def maps_of(cams):
  return cams.cams_mij, cams.raw_mij


@small.BOTH
def test_maps(model, read, found, compat):
  if compat:
    found = run(model, read, 1, rules=RULES._replace(compat=True))
  for cams, labels, wanted in zip(found, SAID, plain_maps(compat), strict=True):
    assert cams.labels_m.tolist() == labels
    assert {maps.dtype for maps in maps_of(cams)} == {np.dtype(np.float32)}
    close(maps_of(cams), wanted.maps, wanted.steepness)
  assert sum(int(cam.max() > 0.99 < raw.max()) for cams in found for cam, raw in zip(*maps_of(cams))) > 10


@pytest.mark.parametrize("options", [dict(shapes=1), dict(shapes=1, pictures=3, pairs=1)])
def test_shapes_and_batches_change_nothing(model, read, found, options):
  for cams, other, wanted in zip(run(model, read, **options), found, plain_maps(), strict=True):
    assert cams.labels_m.tolist() == other.labels_m.tolist()
    close(maps_of(cams), maps_of(other), wanted.steepness)


def test_devices_change_no_bit(model, read):
  alone = run(model, read, 1)
  for devices in (2, 8):
    for cams, other in zip(run(model, read, 1, devices=jax.devices()[:devices]), alone, strict=True):
      for mine, theirs in zip(cams, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_shape_is_compiled_once(model, read, found):
  before = segmenter._maps._cache_size()
  assert len(run(model, read, 2)) == len(found)  # by another engine
  assert segmenter._maps._cache_size() == before


def test_bfloat16(model, read, found):
  halves, _ = nnx.split(hub.abstract(clip.CLIPModel, small.SMALL, dtype=jnp.bfloat16))
  _, state = nnx.split(model)
  halves = nnx.merge(halves, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
  far = 0
  for cams, other, wanted in zip(run(halves, read, 1), found, plain_maps(), strict=True):
    assert cams.cams_mij.dtype == cams.raw_mij.dtype == np.float32
    close(maps_of(cams), maps_of(other), wanted.steepness, 0.05)
    far = max(far, np.abs(cams.raw_mij - other.raw_mij).max(initial=0))
  assert far > 1e-3  # it is another computation


def held(heads, pairs):
  """Bytes that a call needs for a picture of 16 x 32 patches, beside weights and maps."""
  config = {**small.SMALL, "vision_config": {**small.SMALL["vision_config"], "num_attention_heads": heads}}
  made = engine(small.make_model(config, 20), pictures=1, pairs=pairs)
  arrays = [np.zeros((1, 256, 512, 3), np.uint8), *(np.zeros((1, n), np.int32) for n in (2, small.LABELS, pairs))]
  call = segmenter._maps.lower(made.static, made.weights, *arrays, np.zeros(1, np.int32))
  return call.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_heads_and_labels():
  patches, inner = 512, small.SMALL["vision_config"]["intermediate_size"]
  few = held(heads=2, pairs=1)
  assert few < 4 * max(6 * patches**2, 9 * (patches + 1) * inner + 2 * patches**2)
  assert held(heads=16, pairs=40) < 1.1 * few


class Watched:
  """Pictures one of which is damaged; `asked` tells whose pixels were wanted."""

  def __init__(self, read, damaged):
    self.read, self.damaged, self.asked = read, damaged, []
    self.grids_n2 = read.grids_n2

  def __len__(self):
    return len(self.read)

  def pixels(self, row):
    self.asked.append(row)
    if row == self.damaged:
      raise ValueError("b.jpg is damaged")
    return self.read.pixels(row)


def test_pictures_without_labels_are_not_read(model, read):
  watched = Watched(read, damaged=5)  # the one with the most labels
  got = []
  with pytest.raises(ValueError, match=r"b\.jpg is damaged"):
    for cams in engine(model).stream(watched, native.plan(read.grids_n2, 1), TAGS):
      got.append(cams)
  assert not {2, 6} & set(watched.asked)
  assert [cams.row for cams in got[:2]] == [2, 6]
  assert got[0].cams_mij.shape == (0, *read.grids_n2[2]) and got[0].labels_m.tolist() == []
  assert 5 not in [cams.row for cams in got] and len(got) > 6


def test_errors(model, read):
  with pytest.raises(ValueError, match=r"tags are \[11, 5\]: they are \[11, 6\]"):
    next(engine(model).stream(read, [], TAGS[:, 1:]))
  with pytest.raises(ValueError, match="first_layer 3 and last_layer 2 do not fit"):
    engine(model, RULES._replace(first_layer=3, last_layer=2))
  with pytest.raises(ValueError, match="pictures 0 of a batch"):
    engine(model, pictures=0)
  with pytest.raises(ValueError, match=r"texts \[9, 24\] with 10 labels"):
    segmenter.Segmenter(model, PREPROCESS, TEXTS, 10, RULES)
