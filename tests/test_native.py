"""Pictures at their own size, and the shapes that they are padded to."""

import itertools

import numpy as np
import pytest
from PIL import Image

from digzsl_jax.data import native, pictures
from tests.test_pictures import noise, saved, smooth


def opened(folder, names, patch=16, **how):
  return native.NativePictures(folder, [pictures.File(name, b"") for name in names], patch, **how)


def test_whole_patches(tmp_path):
  sizes = [(32, 48), (33, 48), (15, 64), (100, 7)]
  read = opened(tmp_path, [saved(tmp_path, f"{i}.png", noise(*size)) for i, size in enumerate(sizes)])
  assert len(read) == 4
  assert read.sizes_n2.tolist() == [list(size) for size in sizes]
  assert read.grids_n2.tolist() == [[2, 3], [3, 3], [1, 4], [7, 1]]
  np.testing.assert_array_equal(read.pixels(0), noise(32, 48))  # as it is
  wanted = Image.fromarray(noise(33, 48)).resize((48, 48), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(read.pixels(1), np.asarray(wanted))
  for row in range(4):
    assert read.pixels(row).shape == (*16 * read.grids_n2[row], 3) and read.pixels(row).dtype == np.uint8


def test_modes_become_rgb(tmp_path):
  grey = smooth(16, 32)[..., 0]
  Image.fromarray(grey).save(tmp_path / "grey.png")
  Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
  Image.fromarray(np.dstack([grey] * 3 + [grey // 2])).save(tmp_path / "clear.png")
  Image.fromarray(grey).convert("P").save(tmp_path / "palette.gif")
  Image.fromarray(np.dstack([255 - grey] * 3 + [np.zeros_like(grey)]), "CMYK").save(tmp_path / "ink.tif")
  names = ["grey.png", "deep.png", "clear.png", "palette.gif", "ink.tif"]
  read = opened(tmp_path, names)
  for row, name in enumerate(names):
    assert np.abs(read.pixels(row).astype(int) - grey[..., None]).max() <= 1, name


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_are_turned_as_cameras_say(tmp_path, suffix):
  exif = Image.Exif()
  exif[274] = 6  # orientation: turn clockwise by 90 degrees
  pixels = smooth(16, 40)
  read = opened(tmp_path, [saved(tmp_path, f"a.{suffix}", pixels, exif=exif)], patch=8)
  assert read.sizes_n2.tolist() == [[40, 16]] and read.grids_n2.tolist() == [[5, 2]]
  assert np.abs(read.pixels(0).astype(int) - np.rot90(pixels, -1)).max() <= (30 if suffix == "webp" else 0)


def test_sizes_come_from_headers(tmp_path, monkeypatch):
  names = [saved(tmp_path, f"{i}.jpg", noise(20 + i, 30)) for i in range(40)]
  monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
  assert opened(tmp_path, names).sizes_n2.tolist() == [[20 + i, 30] for i in range(40)]


def test_too_many_patches_are_reduced(tmp_path):
  sizes = [(480, 12000), (1, 200), (2000, 1000), (16, 40000)]
  names = [saved(tmp_path, f"{i}.png", np.broadcast_to(np.uint8(90), (*size, 3))) for i, size in enumerate(sizes)]
  read = opened(tmp_path, names, most_patches=100)
  assert read.grids_n2.tolist() == [[2, 50], [1, 13], [14, 7], [1, 100]]
  for row, grid in enumerate(read.grids_n2):
    assert read.pixels(row).shape == (*16 * grid, 3) and (read.pixels(row) == 90).all()
  # Lines of one pixel become their mean, and no pattern of their own.
  stripes = np.zeros((640, 640, 3), np.uint8)
  stripes[:, ::2] = 255
  found = native.ArrayPictures(stripes[None], 16, most_patches=25).pixels(0)
  assert found.shape == (80, 80, 3) and np.abs(found.astype(float) - 127.5).max() < 6


def test_grids_keep_the_aspect():
  for height, width, most in itertools.product((1, 3, 47, 480, 5000), (1, 18, 333, 640, 9001), (1, 40, 1600)):
    rows, columns = native.grid(height, width, 16, most)
    assert min(rows, columns) >= 1 and rows * columns <= most
    whole = -(-height // 16), -(-width // 16)
    if (rows, columns) == whole:
      continue
    assert np.prod(whole) > most
    if min(rows, columns) > 1:
      assert abs(np.log(columns / rows * height / width)) < 0.06


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_damage(tmp_path, name):
  saved(tmp_path, name, noise(60, 60))
  raw = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(raw[:-200])
  with pytest.raises(ValueError, match=rf"{name} cannot be read .*truncated.*; replace or delete it"):
    opened(tmp_path, [name]).pixels(0)
  (tmp_path / name).write_bytes(b"<html>not found</html>")
  with pytest.raises(ValueError, match=rf"{name} cannot be read \(it is no picture\)"):
    _ = opened(tmp_path, [name]).sizes_n2
  with pytest.raises(ValueError, match=r"none\.jpg cannot be read \(there is no such file\)"):
    _ = opened(tmp_path, ["none.jpg"]).grids_n2


def test_arrays_are_as_files(tmp_path):
  images = np.stack([noise(40, 56), smooth(40, 56)])
  files = opened(tmp_path, [saved(tmp_path, f"{i}.png", image) for i, image in enumerate(images)])
  array = native.ArrayPictures(images, 16)
  assert len(array) == len(files) == 2
  for name in ("sizes_n2", "grids_n2"):
    np.testing.assert_array_equal(getattr(array, name), getattr(files, name))
  np.testing.assert_array_equal(array.pixels(1), files.pixels(1))


def padded(grids, buckets):
  return sum(bucket.rows * bucket.columns * len(bucket.members) for bucket in buckets) - np.prod(grids, axis=1).sum()


def plainly(grids, most):
  """Padded patches after joining pairs of lists, each time the one that adds least."""
  parts = [[tuple(grid)] * grids.tolist().count(list(grid)) for grid in sorted(set(map(tuple, grids.tolist())))]
  cost = lambda part: np.prod(np.max(part, axis=0)) * len(part)
  while len(parts) > most:
    added = [(cost(a + b) - cost(a) - cost(b), i, j) for (i, a), (j, b) in itertools.combinations(enumerate(parts), 2)]
    _, i, j = min(added)
    parts[i] += parts.pop(j)
  return sum(cost(part) for part in parts) - np.prod(grids, axis=1).sum()


@pytest.mark.parametrize("seed", range(6))
def test_plan(seed):
  rng = np.random.default_rng(seed)
  grids = rng.integers(1, 9, (60, 2))
  for most in (1, 2, 5, 12, 100):
    buckets = native.plan(grids, most)
    assert len(buckets) <= most
    assert sorted(np.concatenate([bucket.members for bucket in buckets])) == list(range(60))
    for bucket in buckets:
      assert (np.diff(bucket.members) > 0).all()
      assert grids[bucket.members].max(0).tolist() == [bucket.rows, bucket.columns]
    assert padded(grids, buckets) == plainly(grids, most)
    again = native.plan(grids, most)
    assert [(a.rows, a.columns, a.members.tolist()) for a in buckets] == [
        (a.rows, a.columns, a.members.tolist()) for a in again]
  assert padded(grids, native.plan(grids, 100)) == 0


def test_plan_of_a_large_set_is_quick():
  import time
  sides = np.random.default_rng(0).integers(10, 41, (40_000, 2))
  before = time.process_time()
  buckets = native.plan(sides, 8)
  assert time.process_time() - before < 10 and len(buckets) == 8


def test_plan_of_none():
  assert native.plan(np.zeros((0, 2), int), 3) == []
  with pytest.raises(ValueError, match="at least 1 shape, not 0"):
    native.plan(np.ones((3, 2), int), 0)


def test_shapes_are_not_joined_beyond_a_size():
  grids_n2 = np.array([(40, 40), (30, 40), (40, 30), (1, 800), (2, 750), (800, 1)])
  found = native.plan(grids_n2, 1, largest=1600)
  assert [(each.rows, each.columns, each.members.tolist()) for each in found] == [
      (800, 1, [5]), (2, 800, [3, 4]), (40, 40, [0, 1, 2])]
  assert len(native.plan(grids_n2, 1)) == 1
  assert [each.members.tolist() for each in native.plan(grids_n2[:3], 1, largest=100)] == [[0, 1, 2]]
