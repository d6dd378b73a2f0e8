"""Picture files."""

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

  def fail(self, file, **options):
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


def test_writer_has_written_all_at_its_end(tmp_path, monkeypatch):
  monkeypatch.setattr(images, "THREADS", 2)
  with images.Writer() as writer:
    for seed in range(40):  # more than it takes without waiting
      writer.write(tmp_path / f"{seed}.png", _picture(seed), {"seed": str(seed)})
  for seed in range(40):
    np.testing.assert_array_equal(images.read_png(tmp_path / f"{seed}.png"), _picture(seed))
    assert images.read_text(tmp_path / f"{seed}.png") == {"seed": str(seed)}


def test_writer_tells_what_went_wrong(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(OSError, match="could not write .*file/a.png"):
    with images.Writer() as writer:
      writer.write(tmp_path / "file" / "a.png", _picture())
  with pytest.raises(KeyError, match="other"):  # what ended the body, not what its pictures met
    with images.Writer() as writer:
      writer.write(tmp_path / "file" / "a.png", _picture())
      writer.write(tmp_path / "b.png", _picture())
      raise KeyError("other")
  np.testing.assert_array_equal(images.read_png(tmp_path / "b.png"), _picture())
