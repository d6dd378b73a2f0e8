"""Cutout and RandAugment: what they do to a picture, and the same for the same seed."""

import collections

import numpy as np
import pytest
from PIL import Image

from digzsl_jax.data import augment

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


class Signs:
  """In place of a generator: always the same sign, and a picture's middle."""

  def integers(self, bounds):
    return 1 if bounds == 2 else np.array(bounds) // 2


def applied(name, level, picture=PICTURE):
  return np.asarray(augment.OPERATIONS[name](Image.fromarray(picture), level, Signs()))


def recorded(monkeypatch, record):
  for name in augment.OPERATIONS:
    monkeypatch.setitem(augment.OPERATIONS, name, lambda image, level, rng, name=name: record((name, level)) or image)


def test_cutout_paints_one_rectangle_of_half_the_sides(monkeypatch):
  recorded(monkeypatch, lambda _: None)
  sizes, colours = set(), set()
  for seed in range(200):
    view = augment.augment(PICTURE, (seed,))
    y, x = np.nonzero((view != PICTURE).any(2))
    inside = view[y.min():y.max() + 1, x.min():x.max() + 1].reshape(-1, 3)
    assert (inside == inside[0]).all()
    sizes.add((np.ptp(y) + 1, np.ptp(x) + 1))
    colours.add(tuple(inside[0]))
    assert x.max() - x.min() == 15 or x.min() == 0 or x.max() == 31
  heights, widths = zip(*sizes)
  assert max(heights) == 12 and max(widths) == 16
  assert min(heights) == 6 and min(widths) == 8  # half of it is beyond the border
  assert len(colours) == 200


def test_pairs_are_drawn_evenly_and_each_applied_half_the_time(monkeypatch):
  drawn = []
  recorded(monkeypatch, drawn.append)
  for seed in range(3000):
    augment.augment(PICTURE[:4, :4], (7, seed))
  names, levels = (collections.Counter(part) for part in zip(*drawn))
  assert len(drawn) == pytest.approx(3000, abs=200)  # 2 of probability 0.5; 5 standard deviations
  assert set(levels) == set(range(1, 10)) and set(names) == set(augment.OPERATIONS) and len(names) == 15
  for counts in names, levels:
    assert max(counts.values()) < 1.5 * min(counts.values())


@pytest.mark.parametrize("name", augment.OPERATIONS)
@pytest.mark.parametrize("size", [24, 224])
def test_every_operation_keeps_the_shape_and_does_something(name, size):
  shades = np.random.default_rng(0).integers(40, 200, (size, size, 3), np.uint8)
  for level in (1, 9):
    view = applied(name, level, shades)
    assert view.shape == shades.shape and view.dtype == np.uint8
    assert (view != shades).any() or (name, level) in {("posterize", 1), ("solarize", 1)}  # keep 8 bits, need 228


def test_what_the_strengths_mean():
  np.testing.assert_array_equal(applied("invert", 3), 255 - PICTURE)
  np.testing.assert_array_equal(applied("solarize", 9), 255 - PICTURE)
  np.testing.assert_array_equal(applied("solarize", 6), np.where(PICTURE < 256 / 3, PICTURE, 255 - PICTURE))
  np.testing.assert_array_equal(applied("posterize", 9), PICTURE & 0xf0)
  np.testing.assert_array_equal(applied("translate_x", 9)[:, :17], PICTURE[:, 15:])  # 32 * 150 / 331 = 14.5
  assert (applied("translate_x", 9)[:, 18:] == 128).all()
  np.testing.assert_array_equal(applied("translate_y", 9)[:13], PICTURE[11:])
  assert (applied("rotate", 9)[0, -1] == 128).all() and (applied("shear_x", 9)[-1, -1] == 128).all()
  np.testing.assert_allclose(applied("brightness", 9), np.minimum(1.9 * PICTURE, 255), atol=1)
  cut = applied("cutout", 9)
  assert (cut[2:22, 6:26] == augment.CUT).all()
  np.testing.assert_array_equal(cut[:2], PICTURE[:2])


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (48, 20)])
def test_a_seed_gives_the_same_view_in_any_thread(shape):
  images_bhwc = np.random.default_rng(1).integers(0, 256, (40, *shape, 3), np.uint8)
  before_bhwc, seeds = images_bhwc.copy(), [(3, row) for row in range(40)]
  alone = [augment.augment(image, seed) for image, seed in zip(images_bhwc, seeds)]
  np.testing.assert_array_equal(augment.augment_batch(images_bhwc, seeds), alone)
  np.testing.assert_array_equal(augment.augment_batch(images_bhwc[::-1], seeds[::-1])[::-1], alone)
  np.testing.assert_array_equal(images_bhwc, before_bhwc)
  assert not np.array_equal(augment.augment(images_bhwc[0], (4, 0)), alone[0])


def test_bad_input_is_named():
  for bad in (PICTURE[..., :1], PICTURE[..., 0], PICTURE / np.float32(255)):
    with pytest.raises(ValueError, match=r"to augment is .*: give uint8 \[h, w, 3\]"):
      augment.augment(bad, (0,))
  with pytest.raises(ValueError, match="2 seeds for 1 pictures"):
    augment.augment_batch(PICTURE[None], [(0,), (1,)])
