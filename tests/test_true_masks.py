"""True masks of VOC, COCO and COCO-Stuff, and COCO-Stuff's labels, which come out of its masks."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from digzsl_jax import mask_files
from digzsl_jax.data import label_lists, label_maps, multilabel, true_masks, voc


def picture(path, height, width, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def numbers(path, values, palette=None):
  """A PNG of numbers, with a palette if one is given."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(np.array(values, np.uint8))
  if palette is not None:
    image.putpalette(palette.tobytes())
  image.save(path)
  assert image.mode == ("L" if palette is None else "P")


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def test_data_sets_without_masks_have_none():
  without = set(multilabel.LOADERS) - {"scenes", "voc", "coco", "coco_stuff"}
  assert len(without) == 5 and all(true_masks.open({"name": name}, None) is None for name in without)


# VOC.

ANNOTATION = "<annotation><object><name>cat</name></object></annotation>"


def make_voc(root):
  write(root / "ImageSets/Segmentation/val.txt", "a\nb\nc\n")
  for i, name in enumerate("abc"):
    write(root / f"Annotations/{name}.xml", ANNOTATION)
    picture(root / f"JPEGImages/{name}.jpg", 2 + i, 4, i)
    numbers(root / f"SegmentationClass/{name}.png", [[0, 8, 255, i]] * (2 + i), mask_files.palette())
  return {"name": "voc", "folder": str(root), "train": "", "test": "val", "lists": "Segmentation", "size": 8}


def test_masks_of_voc(tmp_path):
  section = make_voc(tmp_path)
  masks = true_masks.open(section, multilabel.load(section))
  assert len(masks) == 3 and masks[1].dtype == np.int16
  assert [masks[n].tolist() for n in range(3)] == [[[-1, 7, -2, i - 1]] * (2 + i) for i in range(3)]
  assert voc.NAMES[7] == "cat" and (true_masks.BACKGROUND, true_masks.NOT_JUDGED) == (-1, -2)


def test_masks_follow_the_pictures_that_are_left(tmp_path):
  section = make_voc(tmp_path) | {"skip_damaged": True}
  (tmp_path / "JPEGImages/b.jpg").unlink()
  (tmp_path / "SegmentationClass/b.png").unlink()
  masks = true_masks.open(section, multilabel.load(section))
  assert [masks[n].shape for n in range(len(masks))] == [(2, 4), (4, 4)]
  before = masks.fingerprint
  numbers(tmp_path / "SegmentationClass/c.png", [[1]])
  assert true_masks.open(section, multilabel.load(section)).fingerprint != before


@pytest.mark.parametrize("damage, message", [
  (lambda path: path.unlink(), r"1 masks of 3 pictures cannot be read: .*b.png \(there is no.*Segmentation"),
  (lambda path: path.write_bytes(b"no picture"), r"b.png \(it is no picture\)"),
  (lambda path: path.write_bytes(path.read_bytes()[:-30]), "1 masks of 3 pictures cannot be read: .*b.png"),
  (lambda path: numbers(path, [[0, 21]]), "b.png has the value 21, which is no label"),
  (lambda path: picture(path, 2, 2), r"b.png holds colours \(mode RGB\)"),
])
def test_bad_masks_are_named(tmp_path, damage, message):
  section = make_voc(tmp_path)
  data = multilabel.load(section)
  damage(tmp_path / "SegmentationClass/b.png")
  with pytest.raises(ValueError, match=message):
    true_masks.open(section, data)[1]


def test_masks_that_vanish_are_named(tmp_path):
  with pytest.raises(ValueError, match="there is no mask .*x.png"):
    label_maps.read(tmp_path / "x.png", np.zeros(256))


# COCO-Stuff.

def make_stuff(root, maps="stuffthingmaps/val2017"):
  """Of ids 1, 182, 13 and unlabelled; of 92 alone; of nothing."""
  for i, values in enumerate(([[0, 0, 181], [12, 255, 255]], [[91]], [[255, 255]])):
    numbers(root / maps / f"00{i}.png", values)
    picture(root / f"val2017/00{i}.jpg", *np.shape(values), i)
  return {"name": "coco_stuff", "folder": str(root), "size": 8}


@pytest.mark.parametrize("maps", ["stuffthingmaps/val2017", "annotations/stuffthingmaps/val2017"])
def test_labels_of_coco_stuff_are_those_of_its_maps(tmp_path, maps):
  section = make_stuff(tmp_path, maps)
  data = multilabel.load(section)
  assert data.names == label_lists.LISTS["coco_stuff"].names and data.seen == tuple(range(171)) and not data.unseen
  assert [[data.names[k] for k in np.flatnonzero(row)] for row in data.test.targets_nk] == [
    ["person", "stop sign", "wood"], ["banner"], []]
  assert data.test.targets_nk.min() == 0 and data.train.targets_nk.shape == (0, 171)
  masks = true_masks.open(section, data)
  assert masks[0].tolist() == [[0, 0, 170], [11, -2, -2]] and masks[1].tolist() == [[80]]
  groups = np.array(label_lists.STUFF27)[masks[0][0]]
  assert [label_lists.STUFF27_NAMES[group] for group in groups] == ["person", "person", "solid"]


def test_lists_choose_images_of_coco_stuff(tmp_path):
  section = make_stuff(tmp_path) | {"list": "val.txt"}
  write(tmp_path / "val.txt", "002\n000 0 181 12\n")
  data = multilabel.load(section)
  assert [file.path for file in data.test.images_nhwc.files] == ["val2017/002.jpg", "val2017/000.jpg"]
  assert data.test.targets_nk.sum(1).tolist() == [0, 3] and true_masks.open(section, data)[1].shape == (2, 3)


@pytest.mark.parametrize("damage, message", [
  (lambda root: numbers(root / "stuffthingmaps/val2017/001.png", [[182]]), "001.png has the value 182, which is no"),
  (lambda root: numbers(root / "stuffthingmaps/val2017/001.png", [[11]]), "001.png has the value 11"),
  (lambda root: write(root / "val.txt", "009\n"), "there is no mask .*009.png"),
  (lambda root: write(root / "val.txt", "001\n001 91\n"), "val.txt: 001 listed more than once"),
  (lambda root: (root / "val.txt").unlink(), "val.txt is missing"),
  (lambda root: (root / "val2017/001.jpg").unlink(), "001.jpg .there is no such file"),
  (lambda root: (root / "stuffthingmaps").rename(root / "maps"), "there is no folder .*stuffthingmaps/val2017; unpack"),
])
def test_bad_files_of_coco_stuff_are_named(tmp_path, damage, message):
  section = make_stuff(tmp_path) | {"list": "val.txt"}
  write(tmp_path / "val.txt", "001\n")
  damage(tmp_path)
  with pytest.raises(ValueError, match=message):
    multilabel.load(section)


def test_a_folder_without_maps_is_named(tmp_path):
  (tmp_path / "stuffthingmaps/val2017").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"val2017 holds no maps .\*.png.; unpack"):
    multilabel.load({"name": "coco_stuff", "folder": str(tmp_path)})


# COCO: images of 6 x 8 pixels.

def box(left, top, right, bottom):
  return [left, top, right, top, right, bottom, left, bottom]


def run_lengths(mask_hw):
  """COCO's uncompressed run lengths: down the columns, zeros first."""
  flat = np.concatenate([[0], np.asarray(mask_hw).T.ravel(), [2]])
  changes = np.flatnonzero(np.diff(flat))
  counts = np.diff(np.concatenate([[0], changes])).tolist()
  return {"counts": counts, "size": list(np.shape(mask_hw))}


def make_coco(root, objects):
  """`objects`: image, category (1 to 3), outline, area, crowd. Category 3 is given the id 90."""
  categories = [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "dog"), (90, "emu"))]
  write(root / "annotations/instances_val2017.json", json.dumps({
    "images": [{"id": i, "file_name": f"{i}.jpg", "height": 6, "width": 8} for i in (7, 3)],
    "categories": categories,
    "annotations": [{"id": 100 + n, "image_id": image, "category_id": categories[k - 1]["id"], "segmentation": outline,
                     "area": area, "iscrowd": crowd} for n, (image, k, outline, area, crowd) in enumerate(objects)]}))
  for i in (3, 7):
    picture(root / f"val2017/{i}.jpg", 6, 8, i)
  return {"name": "coco", "folder": str(root), "train": False, "size": 8}


@pytest.fixture
def tool():
  return pytest.importorskip("pycocotools.mask")


def test_masks_of_coco(tmp_path, tool):
  crowd = np.zeros((6, 8), int)
  crowd[3:, 1:7] = 1
  section = make_coco(tmp_path, [
    (7, 3, [box(2, 1, 5, 4)], 9.0, 0),  # the smallest: above all
    (7, 1, [box(0, 0, 6, 5), box(7, 5, 8, 6)], 31.0, 0),  # in two parts
    (7, 2, run_lengths(crowd), 18.0, 1),  # the crowd: below all
    (3, 2, [box(0, 0, 2, 2)], 4.0, 0),
    (3, 1, [box(0, 0, 2, 2)], 4.0, 0)])  # of equal area: the later
  masks = true_masks.open(section, multilabel.load(section))
  expected = np.full((6, 8), -1)
  expected[crowd == 1] = -2
  expected[0:5, 0:6] = expected[5, 7] = 0
  expected[1:4, 2:5] = 2
  assert len(masks) == 2 and masks[1].dtype == np.int16
  np.testing.assert_array_equal(masks[1], expected)
  np.testing.assert_array_equal(masks[0], np.pad(np.zeros((2, 2)), ((0, 4), (0, 6)), constant_values=-1))


def test_compressed_run_lengths_of_coco(tmp_path, tool):
  inside = np.random.default_rng(0).integers(2, size=(6, 8))
  packed = tool.encode(np.asfortranarray(inside.astype(np.uint8)))
  section = make_coco(tmp_path, [(3, 2, run_lengths(inside), 20.0, 0), (7, 2, packed | {
    "counts": packed["counts"].decode()}, 20.0, 0)])
  masks = true_masks.open(section, multilabel.load(section))
  for n in range(2):
    np.testing.assert_array_equal(masks[n] == 1, inside == 1)


def test_masks_of_coco_follow_its_splits_and_the_pictures_that_are_left(tmp_path, tool):
  section = make_coco(tmp_path, [(3, 1, [box(0, 0, 2, 2)], 4.0, 0), (7, 3, [box(0, 0, 4, 4)], 16.0, 0),
                                 (7, 1, [box(0, 0, 2, 2)], 4.0, 0), (7, 1, run_lengths(np.eye(6, 8, dtype=int)), 6, 1)])
  (tmp_path / "val2017/3.jpg").unlink()
  data = multilabel.load(section | {"skip_damaged": True})
  assert len(true_masks.open(section, data)) == 1
  without_cats = type(data)("x", ("dog", "emu"), (0, 1), (), *(
    type(part)(part.images_nhwc, part.targets_nk[:, 1:]) for part in (data.train, data.test)))
  shown = true_masks.open(section, without_cats)[0]  # a class that is no label is background, its crowd too
  assert (shown[:4, :4] == 1).sum() == 12 and (shown[:2, :2] == -1).all() and shown.min() == -1


@pytest.mark.parametrize("outline, message", [
  ([[1.0, 2.0, 3.0, 4.0]], "a polygon has 4 coordinates"),
  ({"counts": [48], "size": [8, 6]}, r"it is \[8, 6\] in an image of \[6, 8\]"),
])
def test_bad_outlines_of_coco_are_named(tmp_path, tool, outline, message):
  section = make_coco(tmp_path, [(3, 1, outline, 4.0, 0)])
  masks = true_masks.open(section, multilabel.load(section))
  with pytest.raises(ValueError, match=f"val2017.json: the outline of annotation 100 cannot be drawn .{message}"):
    masks[0]


def test_annotations_without_outlines_are_named(tmp_path, tool):
  section = make_coco(tmp_path, [(3, 1, [], 4.0, 0)])
  data = multilabel.load(section)
  assert (true_masks.open(section, data)[0] == -1).all()
  path = tmp_path / "annotations/instances_val2017.json"
  path.write_text(path.read_text().replace('"area"', '"size"'))
  with pytest.raises(ValueError, match=r"instances_val2017.json has no outlines of objects.*not there: 'area'"):
    true_masks.open(section, data)


def test_what_draws_outlines_is_named_where_it_is_absent(tmp_path, monkeypatch):
  section = make_coco(tmp_path, [])
  data = multilabel.load(section)
  monkeypatch.setitem(sys.modules, "pycocotools", None)
  with pytest.raises(ValueError, match="instances_val2017.json are drawn with pycocotools.*pip install pycocotools"):
    true_masks.open(section, data)
