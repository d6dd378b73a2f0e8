"""Maps of patches as labels of pixels, as files and as pictures."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from digzsl_jax import mask_files
from tests.plain_tagclip import resize

NAMES = ["cat", "dog", "a name that is far too long for a narrow picture", "person"]


def random_cams(n, rows, columns):
  return np.random.default_rng(0).random((n, rows, columns)).astype(np.float32)


@pytest.mark.parametrize("size", [(33, 47), (48, 80), (7, 40)])
@pytest.mark.parametrize("background", [False, True])
def test_class_maps(size, background):
  cams = random_cams(2, 3, 5)
  found = mask_files.class_maps(cams, size, background)
  wanted = [resize(cam[..., None].astype(float), *size)[..., 0] for cam in cams]
  if background:
    wanted = [1 - np.maximum(*wanted), *wanted]
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_label_map():
  cams = np.array([[[0.9, 0.1, 0.5]], [[0.2, 0.3, 0.4]]])
  maps = mask_files.class_maps(cams, (1, 3), True)
  found = mask_files.label_map(maps, [7, 2])
  assert found.dtype == np.int16 and found.tolist() == [[7, -1, -1]]  # the first of equals, as np.argmax
  assert mask_files.label_map(mask_files.class_maps(cams, (1, 3), False), [7, 2]).tolist() == [[7, 2, 7]]
  # Without labels all is background.
  nothing = mask_files.label_map(mask_files.class_maps(cams[:0], (2, 3), True), [])
  assert (nothing == -1).all() and nothing.shape == (2, 3)


@pytest.mark.parametrize(("maps", "labels"), [(1, [1, 2]), (4, [1, 2]), (0, [])])
def test_maps_and_labels_go_together(maps, labels):
  with pytest.raises(ValueError, match=f"{maps} maps for {len(labels)} labels"):
    mask_files.label_map(np.zeros((maps, 2, 2)), labels)


def test_palette_is_that_of_voc():
  palette = mask_files.palette()
  assert palette.dtype == np.uint8 and palette.shape == (256, 3)
  assert palette[[0, 1, 2, 7, 8, 15, 20, 255]].tolist() == [
    [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 128], [64, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
  many = mask_files.palette(1000)
  assert (many[:256] == palette).all() and len(np.unique(many, axis=0)) == 1000


def test_palette_png(tmp_path):
  labels = np.array([[-1, 0, 19], [254, 3, -1]], np.int16)
  path = tmp_path / "masks" / "a.png"
  mask_files.write_palette_png(path, labels, mask_files.palette())
  with Image.open(path) as image:
    assert image.mode == "P"
    np.testing.assert_array_equal(np.array(image), labels + 1)
    np.testing.assert_array_equal(np.array(image.convert("RGB")), mask_files.palette()[labels + 1])
  with pytest.raises(ValueError, match="b.png: labels are from -1 to 254, and a palette of 21 colours has them from -1 "
                                       "to 19: give it one for each"):
    mask_files.write_palette_png(tmp_path / "b.png", labels, mask_files.palette(21))
  assert sorted(file.name for file in tmp_path.rglob("*.png")) == ["a.png"]


def test_many_labels_are_16_bits(tmp_path):
  path, palette = tmp_path / "a.png", mask_files.palette(1204)
  for labels in (np.array([[-1, 1202]], np.int16), np.array([[0, 1]], np.int16)):  # by data set, not by picture
    mask_files.write_palette_png(path, labels, palette)
    with Image.open(path) as image:
      assert image.mode == "I;16"
      np.testing.assert_array_equal(np.array(image), labels + 1)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path, labels = tmp_path / "a.png", np.zeros((2, 2), np.int16)
  mask_files.write_palette_png(path, labels, mask_files.palette())
  before = path.read_bytes()

  def full(image, file, **settings):
    file.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Image.Image, "save", full)
  with pytest.raises(OSError, match="could not write .*a.png: No space left on device"):
    mask_files.write_palette_png(path, labels + 1, mask_files.palette())
  assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("size", [(480, 640), (96, 96), (20, 30)])
def test_overlay(size):
  height, width = size
  image = np.full((*size, 3), 100, np.uint8)
  labels = np.full(size, -1, np.int16)
  labels[:height // 2, :width // 2] = 3
  labels[height // 2:, width // 2:] = 2
  palette = mask_files.palette()
  found = mask_files.overlay(image, labels, NAMES, palette)
  times = max(1, mask_files.READABLE // max(size))  # a small picture is enlarged
  height, width = times * height, times * width
  assert found.dtype == np.uint8 and found.shape[1:] == (width, 3) and height < found.shape[0] < 2 * height + 40
  near = 1 + max(height, width) // 400
  assert (found[height // 4, width // 4] == (image[0, 0] + palette[4].astype(int)) / 2).all()
  assert (found[height // 4, width // 2 - 1] == palette[4]).all()  # the outline
  assert (found[height // 4, width // 2] == 255).all()  # white around it
  np.testing.assert_array_equal(found[:height // 2 - near - 1, width // 2 + near + 1:], 100)
  legend = found[height:].reshape(-1, 3)
  for label in (2, 3):
    assert (legend == palette[label + 1]).all(1).sum() >= 25
  assert not (legend == palette[1]).all(1).any()  # nothing of labels that are not there
  for rows in (found[height:, :1], found[height:, -1:]):  # names are cut to what there is room for
    assert (rows == 255).all()


def test_overlay_of_background_is_the_picture():
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
  found = mask_files.overlay(image, np.full((20, 30), -1, np.int16), NAMES, mask_files.palette())
  assert found.shape == (160, 240, 3)
  for i, j in np.ndindex(8, 8):
    np.testing.assert_array_equal(found[i::8, j::8], image)
  with pytest.raises(ValueError, match="labels of 2x3 pixels for a picture of 20x30"):
    mask_files.overlay(image, np.zeros((2, 3), np.int16), NAMES, mask_files.palette())


class Recorder:
  """In place of pydensecrf's field: one round without neighbours."""

  def __init__(self, width, height, labels):
    self.said = {"size": (width, height, labels)}

  def setUnaryEnergy(self, unary):  # noqa: N802
    assert unary.dtype == np.float32 and unary.flags.c_contiguous
    self.said["unary"] = unary

  def addPairwiseGaussian(self, **settings):  # noqa: N802
    self.said["near"] = settings

  def addPairwiseBilateral(self, rgbim, **settings):  # noqa: N802
    assert rgbim.flags.c_contiguous and rgbim.flags.writeable
    self.said["alike"], self.said["image"] = settings, rgbim

  def inference(self, rounds):
    self.said["rounds"] = rounds
    Recorder.last = self.said
    return np.exp(-self.said["unary"])


def test_what_the_crf_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "pydensecrf", types.SimpleNamespace(
    densecrf=types.SimpleNamespace(DenseCRF2D=Recorder)))
  maps = mask_files.class_maps(random_cams(2, 2, 3), (20, 30), True)
  maps[1, 0, 0] = 0
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
  image.flags.writeable = False
  found = mask_files.refine_crf(maps, image)
  np.testing.assert_allclose(found, np.maximum(maps, 1e-5), rtol=1e-5)
  said = Recorder.last
  assert said["size"] == (30, 20, 3) and said["rounds"] == 10
  assert said["near"] == dict(sxy=1, compat=3) and said["alike"] == dict(sxy=67, srgb=3, compat=4)
  np.testing.assert_array_equal(said["image"], image)
  for wrong in (image[:10], image.astype(np.float32)):
    with pytest.raises(ValueError, match=r"and its maps are 20x30: it is uint8 \[20, 30, 3\]"):
      mask_files.refine_crf(maps, wrong)


def test_crf_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "pydensecrf", None)
  with pytest.raises(ValueError, match=r"pydensecrf2, which is not installed: pip install 'digzsl_jax\[crf\]'"):
    mask_files.refine_crf(np.zeros((2, 4, 4), np.float32), np.zeros((4, 4, 3), np.uint8))


def kernel(features):
  """Between all pixels, scaled so that both of its sides count alike."""
  weights = np.exp(-((features[:, None] - features[None]) ** 2).sum(-1) / 2)
  sums = np.sqrt(weights.sum(1))
  return weights / sums / sums[:, None]


def mean_field(maps, image):
  """The CRF's equations over all pairs of pixels."""
  k, height, width = maps.shape
  place = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(float)
  colours = image.reshape(-1, 3).astype(float)
  pairs = 3 * kernel(place) + 4 * kernel(np.concatenate([place / 67, colours / 3], 1))
  unary = -np.log(np.clip(maps.reshape(k, -1).astype(float), 1e-5, 1))
  normal = lambda x: np.exp(x - x.max(0)) / np.exp(x - x.max(0)).sum(0)
  found = normal(-unary)
  for _ in range(10):
    found = normal(found @ pairs - unary)
  return found.reshape(maps.shape)


def test_crf_follows_the_picture():
  pytest.importorskip("pydensecrf", reason="pydensecrf2 is absent: pip install 'digzsl_jax[crf]'")
  rng = np.random.default_rng(0)
  inside = np.zeros((24, 32), bool)
  inside[5:18, 9:27] = True
  image = np.where(inside[..., None], [200, 60, 40], [40, 120, 60]) + rng.integers(-1, 2, (24, 32, 3))
  image = image.astype(np.uint8)
  maps = np.stack([np.full((24, 32), 0.5), np.full((24, 32), 0.5)]).astype(np.float32)
  maps[1] += np.where(inside, 0.15, -0.15) + rng.normal(0, 0.2, inside.shape)
  maps[0] = 1 - maps[1]
  maps = maps.clip(0, 1)
  found = mask_files.refine_crf(maps, image)
  wanted = mean_field(maps, image)
  assert ((maps[1] > 0.5) != inside).mean() > 0.1
  assert ((found[1] > 0.5) == inside).mean() > 0.99
  # Its lattice is an approximation of the sum over all pairs.
  assert np.abs(found - wanted).mean() < 0.02 and ((found[1] > 0.5) == (wanted[1] > 0.5)).mean() > 0.99
