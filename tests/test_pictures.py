"""Picture files in place of an array: pixels, laziness, damage."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from digzsl_jax import resize
from digzsl_jax.data import pictures, splits
from digzsl_jax.models import cdm


def smooth(height, width, seed=0):
  """A picture without sharp edges."""
  waves = np.random.default_rng(seed).uniform(0.02, 0.15, (2, 3))
  y, x = np.mgrid[:height, :width][..., None]
  return (127.5 + 120 * np.sin(y * waves[0]) * np.cos(x * waves[1])).astype(np.uint8)


def noise(height, width):
  return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def saved(folder, name, pixels, **options):
  Image.fromarray(pixels).save(folder / name, **options)
  return name


def opened(folder, names, size, **how):
  files, damaged = pictures.scan(folder, names)
  assert not damaged
  return pictures.Pictures(folder, files, size, **how)


def as_pillow(pixels_ijc, size):
  """Pillow's two passes by our weights, each rounded to bytes; then the central square."""
  *scaled, top, left = resize.fit(*pixels_ijc.shape[:2], size, size)
  rounded = lambda x: np.floor(np.clip(x, 0, 255) + 0.5)
  across = rounded(np.einsum("xj,ijc->ixc", resize.weights(pixels_ijc.shape[1], scaled[1]), pixels_ijc))
  return rounded(np.einsum("yi,ixc->yxc", resize.weights(len(pixels_ijc), scaled[0]), across))[
      top:top + size, left:left + size]


@pytest.mark.parametrize("shape", [(90, 61), (40, 57), (24, 31), (11, 9), (16, 16)])
def test_pillow_has_our_weights_and_geometry(tmp_path, shape):
  pixels = noise(*shape)
  got = opened(tmp_path, [saved(tmp_path, "a.png", pixels)], 16)[0]
  assert got.shape == (16, 16, 3) and got.dtype == np.uint8
  assert np.abs(as_pillow(pixels.astype(np.float32), 16) - got).max() <= 1
  exact = (shape == (16, 16)) == np.array_equal(pixels[:16, :16], got)
  assert exact


@pytest.mark.parametrize("shape", [(90, 61), (40, 57), (11, 9)])
def test_files_and_generated_images_are_prepared_alike(tmp_path, shape):
  pixels = smooth(*shape)
  got = opened(tmp_path, [saved(tmp_path, "a.png", pixels)], 16)[0]
  generated = cdm.Preprocess(16)(jnp.asarray(pixels[None] / np.float32(127.5) - 1))[0]
  assert np.abs((np.asarray(generated) + 1) * 127.5 - got).max() <= 1.01  # of 255: both passes of Pillow round


def triangle(inputs, outputs):
  """Bilinear interpolation along one side as a matrix, the kernel wider where pixels become fewer."""
  ratio = inputs / outputs
  away = np.abs(np.arange(inputs) - ((np.arange(outputs)[:, None] + 0.5) * ratio - 0.5)) / max(ratio, 1)
  weights = np.maximum(1 - away, 0)
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(90, 61), (40, 57), (11, 9), (16, 16)])
def test_squashed_pictures_are_whole(tmp_path, shape):
  pixels = noise(*shape)
  name = saved(tmp_path, "a.png", pixels)
  got = opened(tmp_path, [name], 16, fit="squash")[0]
  expected = np.einsum("yi,xj,ijc->yxc", triangle(shape[0], 16), triangle(shape[1], 16), pixels)
  assert got.shape == (16, 16, 3) and np.abs(expected - got).max() <= 1.01  # of 255: both passes of Pillow round
  assert np.array_equal(got, opened(tmp_path, [name], 16)[0]) == (shape == (16, 16))


def test_squashed_pictures_differ_in_fingerprint_and_stay_squashed(tmp_path):
  names = [saved(tmp_path, f"{i}.png", smooth(9, 30, i)) for i in range(3)]
  cropped, squashed = opened(tmp_path, names, 8), opened(tmp_path, names, 8, fit="squash")
  assert cropped.fingerprint != squashed.fingerprint
  assert cropped.fingerprint == opened(tmp_path, names, 8, fit="crop").fingerprint
  np.testing.assert_array_equal(squashed.take(slice(1, None))[:], squashed[1:])
  assert (squashed[:] != cropped[:]).any((1, 2, 3)).all()


def test_weights():
  for inputs, outputs in ((10, 4), (4, 10), (7, 1)):
    weights = resize.weights(inputs, outputs)
    assert weights.shape == (outputs, inputs)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-7)
  np.testing.assert_array_equal(resize.weights(5, 5), np.eye(5))


def test_modes_become_rgb(tmp_path):
  grey = smooth(12, 12)[..., 0]
  Image.fromarray(grey).save(tmp_path / "grey.png")
  Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
  Image.fromarray(np.dstack([grey] * 3 + [grey // 2])).save(tmp_path / "clear.png")
  Image.fromarray(grey).convert("P").save(tmp_path / "palette.gif")
  Image.fromarray(np.dstack([255 - grey] * 3 + [np.zeros_like(grey)]), "CMYK").save(tmp_path / "ink.tif")
  names = ["grey.png", "deep.png", "clear.png", "palette.gif", "ink.tif"]
  for name, pixels in zip(names, opened(tmp_path, names, 12)[:]):
    assert np.abs(pixels.astype(int) - grey[..., None]).max() <= 1, name


def test_pictures_are_turned_as_cameras_say(tmp_path):
  exif = Image.Exif()
  exif[274] = 6  # orientation: turn clockwise by 90 degrees
  pixels = smooth(16, 16)
  images = opened(tmp_path, [saved(tmp_path, "a.png", pixels), saved(tmp_path, "b.png", pixels, exif=exif)], 16)
  np.testing.assert_array_equal(images[1], np.rot90(images[0], -1))


def test_in_place_of_an_array(tmp_path, monkeypatch):
  names = [saved(tmp_path, f"{i}.png", smooth(9 + i, 12, i)) for i in range(6)]
  images = opened(tmp_path, names, 8)
  array = np.stack([images[row] for row in range(6)])
  read = []
  decode = pictures.decode
  monkeypatch.setattr(pictures, "decode", lambda path, *how: read.append(path.name) or decode(path, *how))
  assert (len(images), images.shape, images.ndim, images.dtype) == (6, array.shape, array.ndim, array.dtype)
  labelled = splits.LabelledImages(images, np.arange(6, dtype=np.int32))
  for rows in (np.array([4, 1]), np.arange(6) % 2 == 1, np.arange(0)):
    taken = labelled.take(rows)
    assert not read and taken.labels_n.tolist() == np.arange(6)[rows].tolist()
    np.testing.assert_array_equal(taken.images_nhwc[:], array[rows])
    read.clear()
  np.testing.assert_array_equal(images[2:4], array[2:4])
  assert sorted(read) == ["2.png", "3.png"]
  with pytest.raises(IndexError):
    images[6]


def dataset(folder, names, size=8):
  images = opened(folder, names, size)
  labels_n = np.repeat(np.arange(4, dtype=np.int32), len(names) // 4)
  of = lambda *classes: splits.LabelledImages(images, labels_n).take(np.isin(labels_n, classes))
  return splits.Dataset("zoo", ("ant", "bee", "cat", "dog"), (0, 1, 2), (3,), (1,), of(0, 1, 2), of(0, 1, 2), of(3))


def test_data_sets_of_files_decode_nothing(tmp_path, monkeypatch):
  names = [saved(tmp_path, f"{i}.jpg", smooth(12, 12, i)) for i in range(16)]
  monkeypatch.setattr(pictures, "decode", lambda *arguments: pytest.fail("decoded"))
  data = dataset(tmp_path, names)
  assert "images of 8x8 pixels: train 12" in splits.summary(data)
  assert splits.tasks(data)["validation"].test_unseen.images_nhwc.shape == (2, 8, 8, 3)
  before = splits.fingerprint(data)
  assert splits.fingerprint(dataset(tmp_path, names)) == before
  assert splits.fingerprint(dataset(tmp_path, names, size=9)) != before
  saved(tmp_path, "5.jpg", smooth(12, 12, 99))
  assert splits.fingerprint(dataset(tmp_path, names)) != before


def test_a_change_in_the_middle_of_a_large_file_changes_the_fingerprint(tmp_path):
  pixels = noise(150, 150)
  for name, options in (("a.jpg", {"quality": 95}), ("a.png", {})):
    saved(tmp_path, name, pixels, **options)
    assert (tmp_path / name).stat().st_size > 3 * 4096
    before = opened(tmp_path, [name], 8).fingerprint
    other = pixels.copy()
    other[75, 75] ^= 128
    saved(tmp_path, name, other, **options)
    assert opened(tmp_path, [name], 8).fingerprint != before


@pytest.mark.parametrize("name, damage, message", [
    ("a.jpg", lambda raw: raw[:-200], "truncated"),
    ("a.png", lambda raw: raw[:-200], "truncated"),
    ("a.webp", lambda raw: raw[:-40], "no picture|truncated|decod"),
    ("a.jpg", lambda raw: b"", "no picture"),
    ("a.jpg", lambda raw: b"<html>not found</html>", "no picture")])
def test_damage_is_found_at_load(tmp_path, name, damage, message):
  saved(tmp_path, name, noise(60, 60))
  raw = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(damage(raw))
  saved(tmp_path, "good.png", noise(9, 9))
  files, damaged = pictures.scan(tmp_path, ["good.png", name, "none.jpg"])
  assert [file.path for file in files] == ["good.png"] and set(damaged) == {name, "none.jpg"}
  assert re.search(message, damaged[name]) and damaged["none.jpg"] == "there is no such file"


def test_damage_inside_is_found_when_decoding(tmp_path):
  saved(tmp_path, "a.png", noise(60, 60))
  raw = bytearray((tmp_path / "a.png").read_bytes())
  raw[len(raw) // 2] ^= 255
  (tmp_path / "a.png").write_bytes(raw)
  with pytest.raises(ValueError, match=r"a\.png cannot be read .*; replace or delete it"):
    opened(tmp_path, ["a.png"], 8)[:]


def test_padding_after_the_end_is_no_damage(tmp_path):
  saved(tmp_path, "a.jpg", noise(60, 60))
  whole = opened(tmp_path, ["a.jpg"], 16)[0]
  (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + bytes(5000))
  np.testing.assert_array_equal(opened(tmp_path, ["a.jpg"], 16)[0], whole)


def test_work_in_threads_keeps_its_order_and_is_silent_if_fast(capsys):
  assert pictures.in_threads(lambda item: item * 2, range(50), "doubling") == list(range(0, 100, 2))
  assert capsys.readouterr() == ("", "")


def test_photographs(real_data):
  folder = real_data / "cub100" / "images"
  names = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("00*/000*.jpg"))]
  images = opened(folder, names, 64)
  for row, name in enumerate(names):
    with Image.open(folder / name) as image:
      assert np.abs(as_pillow(np.asarray(image, np.float32), 64) - images[row]).max() <= 1
