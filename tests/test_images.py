"""Picture files, number ranges and grids."""

import numpy as np
import pytest
from PIL import Image

from digzsl_jax.data import images


def _picture(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(256, size=(9, 7, 3)).astype(np.uint8)


def test_png_round_trip_and_replacement(tmp_path):
  path = tmp_path / "a.png"
  for seed in (0, 1):
    images.write_png(path, _picture(seed))
    np.testing.assert_array_equal(images.read_png(path), _picture(seed))
  assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  images.write_png(path, _picture())

  def fail(self, file, format):
    file.write_bytes(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(Image.Image, "save", fail)
  with pytest.raises(OSError, match="disk full"):
    images.write_png(path, _picture(1))
  np.testing.assert_array_equal(images.read_png(path), _picture())
  assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_other_modes_become_rgb(tmp_path):
  grey = _picture()[..., 0]
  Image.fromarray(grey).save(tmp_path / "grey.png")
  np.testing.assert_array_equal(images.read_png(tmp_path / "grey.png"), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-60], lambda raw: raw[:20], lambda raw: b"text",
                                    lambda raw: b""])
def test_damaged_files_are_named(tmp_path, damage):
  path = tmp_path / "a.png"
  images.write_png(path, np.random.default_rng(0).integers(256, size=(32, 32, 3)).astype(np.uint8))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=r"a\.png is truncated or no image.*again"):
    images.read_png(path)


def test_missing_file_and_bad_array(tmp_path):
  with pytest.raises(ValueError, match=r"no image file .*gone\.png"):
    images.read_png(tmp_path / "gone.png")
  with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\], not float64"):
    images.write_png(tmp_path / "a.png", _picture() / 255)


def test_float_round_trip():
  every = np.arange(256, dtype=np.uint8)
  floats = images.to_float(every)
  assert floats.dtype == np.float32 and floats[0] == -1 and floats[-1] == 1
  np.testing.assert_array_equal(images.to_uint8(floats), every)
  np.testing.assert_array_equal(images.to_uint8(np.array([-3.0, 3.0])), [0, 255])
  with pytest.raises(ValueError, match="float32"):
    images.to_float(floats)


def test_grid_and_upscale():
  pictures = np.stack([_picture(seed) for seed in range(5)])
  sheet = images.grid(pictures, columns=3, pad=2)
  assert sheet.shape == (2 * 11 + 2, 3 * 9 + 2, 3)
  for i, picture in enumerate(pictures):
    row, column = divmod(i, 3)
    top, left = 2 + row * 11, 2 + column * 9
    np.testing.assert_array_equal(sheet[top:top + 9, left:left + 7], picture)
  assert (sheet[13:, 20:] == 255).all() and (sheet[:2] == 255).all()
  large = images.upscale(pictures, 3)
  assert large.shape == (5, 27, 21, 3)
  np.testing.assert_array_equal(large[:, 1::3, 2::3], pictures)
