"""Multi-label data sets of picture files: NUS-WIDE, COCO, VOC, tables and lists of one's own."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from digzsl_jax.data import coco, multilabel, nus_wide, voc


@pytest.fixture
def root(tmp_path):
  return tmp_path


def picture(path, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)).save(path)


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode())


def paths(tagged):
  return [file.path for file in tagged.images_nhwc.files]


def labels(data, part):
  """What each image of a part holds, by name."""
  return [[name for name, target in zip(data.names, targets) if target == 1]
          for targets in getattr(data, part).targets_nk]


def replace(path, old, new):
  """A damage: `old` becomes `new` in a file."""
  return lambda root: write(root / path, (root / path).read_text(encoding="utf-8").replace(old, new))


# Tables of one's own.

TABLE = """file,labels,split
a.png,cat;dog,train
b.png, dog ,train
c.png,,train
d.png,"emu; cat",test
"""


def make_table(root):
  write(root / "my.csv", TABLE)
  write(root / "unseen.txt", "emu\n\n")
  for i, name in enumerate("abcd"):
    picture(root / f"{name}.png", i)


def load_table(root, **changes):
  return multilabel.load({"name": "table", "table": str(root / "my.csv"), "unseen": "unseen.txt", "size": 8} | changes)


def test_table(root):
  make_table(root)
  data = load_table(root)
  assert (data.name, data.names, data.seen, data.unseen) == ("my", ("cat", "dog", "emu"), (0, 1), (2,))
  assert labels(data, "train") == [["cat", "dog"], ["dog"], []] and labels(data, "test") == [["cat", "emu"]]
  assert paths(data.train) == ["a.png", "b.png", "c.png"] and paths(data.test) == ["d.png"]
  assert data.seen_targets().tolist() == [[1, 1], [0, 1], [0, 0]]
  assert load_table(root, unseen="").unseen == ()
  with Image.open(root / "d.png") as image:  # whole, not cropped
    np.testing.assert_array_equal(data.test.images_nhwc[0], np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("damage, message", [
  (replace("my.csv", "file,", "path,"), "my.csv, line 1: the header is 'path,labels,split'; it must be file,labels,"),
  (replace("my.csv", "d.png,", "d.png;"), "my.csv, line 5: a row has three columns"),
  (replace("my.csv", "d.png", ""), "my.csv, line 5: a row has three columns, the first not empty"),
  (replace("my.csv", "test", "val"), "my.csv, line 5: the split is 'val'; it must be train or test"),
  (replace("my.csv", "cat;dog", "cat;;dog"), "my.csv, line 2: a label is empty"),
  (replace("my.csv", "b.png", "a.png"), "my.csv: a.png listed more than once"),
  (lambda root: write(root / "my.csv", "file,labels,split\na.png,,train\n"), "my.csv: no image has a label"),
  (lambda root: write(root / "my.csv", ""), "my.csv must have a header and rows"),
  (lambda root: (root / "my.csv").write_bytes(b"\xff\xfe\x00"), "my.csv is no .csv file in UTF-8"),
  (lambda root: (root / "my.csv").unlink(), "there is no table .*my.csv"),
  (lambda root: write(root / "unseen.txt", "emus"), "unseen.txt: no image has the label 'emus'. The nearest are 'emu'"),
  (lambda root: write(root / "unseen.txt", "emu\nemu"), "unseen.txt: emu listed more than once"),
  (lambda root: write(root / "unseen.txt", "\n"), "unseen.txt is empty; it holds the names of the unseen labels"),
  (lambda root: (root / "unseen.txt").unlink(), "unseen.txt is missing"),
  (lambda root: write(root / "unseen.txt", "emu\ncat\ndog"), "my: the list of seen labels is empty"),
  (replace("my.csv", "test", "train"), "my: there are no test images"),
  (lambda root: (root / "d.png").unlink(), "1 picture files cannot be read: .*d.png .there is no such file"),
])
def test_bad_tables_are_named(root, damage, message):
  make_table(root)
  damage(root)
  with pytest.raises(ValueError, match=f"config.data: .*{message}"):
    load_table(root)


def test_damaged_pictures_are_left_out_when_asked(root):
  make_table(root)
  (root / "b.png").unlink()
  write(root / "c.png", "no picture")
  with pytest.raises(ValueError, match="2 picture files cannot be read.*set skip_damaged=True"):
    load_table(root)
  data = load_table(root, skip_damaged=True)
  assert paths(data.train) == ["a.png"] and labels(data, "train") == [["cat", "dog"]]
  assert data.notes == ("left out 2 damaged files: b.png, c.png",)
  make_table(root)
  picture(root / "d.png", 0)
  assert load_table(root).notes == ("warning: 1 test pictures are training pictures too: d.png",)


# Lists of image ids and label numbers, as TagCLIP has them.

def make_lists(root):
  write(root / "names.txt", "cat\ndog\nemu\n")
  write(root / "train.txt", "001 0 1\n002\n")
  write(root / "val.txt", "003 2\n")
  for i in (1, 2, 3):
    picture(root / f"images/00{i}.png", i)


LISTS = {"name": "lists", "names": "names.txt", "train": "train.txt", "train_images": "images", "test": "val.txt",
         "test_images": "images", "suffix": ".png", "size": 8}


def test_lists(root):
  make_lists(root)
  data = multilabel.load(LISTS | {"folder": str(root)})
  assert labels(data, "train") == [["cat", "dog"], []] and labels(data, "test") == [["emu"]]
  assert paths(data.test) == ["images/003.png"] and data.unseen == ()
  write(root / "unseen.txt", "emu")
  alone = multilabel.load({k: v for k, v in LISTS.items() if "train" not in k} | {"folder": str(root),
                                                                                 "unseen": "unseen.txt"})
  assert alone.unseen == (2,) and len(alone.train.images_nhwc) == 0 and alone.train.targets_nk.shape == (0, 3)


@pytest.mark.parametrize("damage, message", [
  (replace("val.txt", "2", "3"), "val.txt, line 1: image 003 has the label '3', but labels are numbers from 0 to 2"),
  (replace("train.txt", "1\n", "-1\n"), "train.txt, line 1: image 001 has the label '-1'"),
  (replace("train.txt", "002", "001"), "train.txt: 001 listed more than once"),
  (replace("names.txt", "dog", "cat"), "names.txt: cat listed more than once"),
  (lambda root: (root / "val.txt").unlink(), "val.txt is missing; it holds image ids"),
  (lambda root: write(root / "val.txt", ""), "val.txt is empty"),
])
def test_bad_lists_are_named(root, damage, message):
  make_lists(root)
  damage(root)
  with pytest.raises(ValueError, match=message):
    multilabel.load(LISTS | {"folder": str(root)})


def test_lists_of_coco_photographs(real_data):
  folder = real_data / "coco256"
  data = multilabel.load({
    "name": "lists", "folder": str(folder), "names": "classes.txt", "size": 32,
    "train": "train2017_image_labels.txt", "train_images": "images/train2017",
    "test": "val2017_image_labels.txt", "test_images": "images/val2017"})
  counts = [(len(part.targets_nk), int(part.targets_nk.sum()), int(part.targets_nk.any(0).sum()))
            for part in (data.train, data.test)]
  assert counts == [(126, 362, 71), (128, 373, 73)]
  assert data.test.images_nhwc[:3].shape == (3, 32, 32, 3)
  boxes = 0
  for path, targets_k in zip(paths(data.test), data.test.targets_nk):  # the boxes are of another source
    lines = (folder / "labels/val2017" / pathlib.Path(path).with_suffix(".txt").name).read_text().splitlines()
    assert set(np.flatnonzero(targets_k)) == {int(line.split()[0]) for line in lines}
    boxes += len(lines)
  assert boxes == 898
  assert set(coco.UNSEEN["48/17"] + coco.UNUSED["48/17"] + coco.UNSEEN["65/15"]) <= set(data.names)


# COCO.

def instances(images, boxes, names=("cat", "dog", "emu")):
  return {"images": [{"id": i, "file_name": f"{i:03}.jpg", "width": 9} for i in images],
          "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(names)],
          "annotations": [{"id": n, "image_id": image, "category_id": 10 * (k + 1), "iscrowd": n % 2, "area": 3.0,
                           "segmentation": [[1.0, 2.0]]} for n, (image, k) in enumerate(boxes)]}


def make_coco(root, **how):
  found = {"train": instances([7, 3, 5], [(7, 0), (7, 1), (7, 0), (5, 1)], **how),
           "val": instances([9], [(9, 2), (9, 0)], **how)}
  for part, annotations in found.items():
    write(root / f"annotations/instances_{part}2017.json", json.dumps(annotations))
    for image in annotations["images"]:
      picture(root / f"{part}2017" / image["file_name"], image["id"])


def load_coco(root, **changes):
  return multilabel.load({"name": "coco", "folder": str(root), "size": 8} | changes)


def test_coco(root):
  make_coco(root)
  data = load_coco(root)
  assert (data.name, data.names, data.seen, data.unseen) == ("coco2017", ("cat", "dog", "emu"), (0, 1, 2), ())
  assert paths(data.train) == ["train2017/003.jpg", "train2017/005.jpg", "train2017/007.jpg"]
  assert labels(data, "train") == [[], ["dog"], ["cat", "dog"]] and labels(data, "test") == [["cat", "emu"]]
  assert len(multilabel.with_any(data.train, data.seen)) == 2
  assert len(load_coco(root, train=False).train.images_nhwc) == 0


@pytest.mark.parametrize("split, seen, unseen", [("48/17", 48, 17), ("65/15", 65, 15)])
def test_zero_shot_splits_of_coco(root, split, seen, unseen):
  special = {*coco.UNSEEN[split], *coco.UNUSED[split]}
  make_coco(root, names=[*(f"class {k}" for k in range(80 - len(special))), *sorted(special)])
  data = load_coco(root, split=split)
  assert (len(data.seen), len(data.unseen), len(data.names)) == (seen, unseen, seen + unseen)
  assert {data.names[k] for k in data.unseen} == set(coco.UNSEEN[split])
  assert not {*coco.UNUSED[split]} & {*data.names} and data.name == f"coco2017-{split.replace('/', '-')}"
  assert labels(data, "test") == [["class 0", "class 2"]]


@pytest.mark.parametrize("damage, message", [
  (lambda root: (root / "annotations/instances_val2017.json").unlink(), "there is no .*instances_val2017.json"),
  (lambda root: write(root / "annotations/instances_val2017.json", '{"images": ['), "val2017.json is no JSON"),
  (lambda root: write(root / "annotations/instances_val2017.json", "{}"), "val2017.json has no COCO annotations"),
  (lambda root: write(root / "annotations/instances_val2017.json", "[]"), "val2017.json has no COCO annotations"),
  (replace("annotations/instances_val2017.json", '"image_id": 9', '"image_id": 8'), "val2017.json: an annotation is of "
                                                                                  "image 8, which is not listed"),
  (replace("annotations/instances_val2017.json", '"category_id": 30', '"category_id": 4'), "of category 4, which is"),
  (replace("annotations/instances_train2017.json", '"id": 3, "file', '"id": 5, "file'), r"id 5 \(.*\) is listed more"),
  (replace("annotations/instances_train2017.json", "emu", "gnu"), "train2017.json has other categories than"),
  (lambda root: (root / "train2017/005.jpg").unlink(), "train2017/005.jpg .there is no such file"),
])
def test_bad_annotations_of_coco_are_named(root, damage, message):
  make_coco(root)
  damage(root)
  with pytest.raises(ValueError, match=message):
    load_coco(root)


@pytest.mark.parametrize("changes, message", [
  (dict(year=2015), "year is 2015"), (dict(split="40/40"), 'split is "40/40"; it must be one of 48/17, 65/15'),
  (dict(split="48/17"), "have no category airplane, bus"), (dict(size=0), "size is 0")])
def test_bad_settings_of_coco_are_named(root, changes, message):
  make_coco(root)
  with pytest.raises(ValueError, match=message):
    load_coco(root, **changes)


# VOC.

def annotation(*objects):
  """Of (class, difficult) pairs; parts of an object have names too."""
  found = "".join(f"<object><name>{name}</name><difficult>{hard}</difficult><part><name>head</name></part></object>"
                  for name, hard in objects)
  return f"<annotation><filename>x.jpg</filename>{found}</annotation>"


def make_voc(root):
  write(root / "ImageSets/Main/trainval.txt", "000001\n000002\n")
  write(root / "ImageSets/Main/test.txt", "000003\n")
  write(root / "ImageSets/Segmentation/val.txt", "000002\n")
  write(root / "Annotations/000001.xml", annotation(("dog", 0), ("person", 1), ("person", 0)))
  write(root / "Annotations/000002.xml", annotation(("cat", 1), ("dog", 0), ("dog", 1)))
  write(root / "Annotations/000003.xml", annotation(("cat", 0), ("sofa", 1), ("sofa", 1)))
  for i in (1, 2, 3):
    picture(root / f"JPEGImages/00000{i}.jpg", i)


def test_voc(root):
  make_voc(root / "VOC2007")
  data = multilabel.load({"name": "voc", "folder": str(root / "VOC2007"), "size": 8})
  assert data.names == voc.NAMES and len(voc.NAMES) == 20 and data.name == "voc2007"
  assert labels(data, "train") == [["dog", "person"], ["dog"]] and labels(data, "test") == [["cat"]]
  cat, sofa = (data.names.index(name) for name in ("cat", "sofa"))
  assert data.train.targets_nk[1, cat] == data.test.targets_nk[0, sofa] == -1
  assert (data.train.targets_nk == -1).sum() == (data.test.targets_nk == -1).sum() == 1
  write(root / "VOC2007/unseen.txt", "cat")
  alone = multilabel.load({"name": "voc", "folder": str(root / "VOC2007"), "train": "", "unseen": "unseen.txt"})
  assert alone.unseen == (cat,) and not len(alone.train.targets_nk)
  with_masks = multilabel.load({"name": "voc", "folder": str(root / "VOC2007"), "train": "", "test": "val",
                                "lists": "Segmentation"})
  assert paths(with_masks.test) == ["JPEGImages/000002.jpg"] and labels(with_masks, "test") == [["dog"]]
  with pytest.raises(ValueError, match='lists is "Layout"; it must be Main or Segmentation'):
    multilabel.load({"name": "voc", "folder": str(root / "VOC2007"), "lists": "Layout"})


@pytest.mark.parametrize("damage, message", [
  (replace("Annotations/000002.xml", "cat", "gnu"), "000002.xml: an object is of class 'gnu', which is none of VOC"),
  (replace("Annotations/000002.xml", "</annotation>", ""), "000002.xml is no XML"),
  (lambda root: (root / "Annotations/000003.xml").unlink(), "there is no annotation .*000003.xml"),
  (lambda root: (root / "JPEGImages/000003.jpg").unlink(), "000003.jpg .there is no such file"),
  (lambda root: (root / "ImageSets/Main/test.txt").unlink(), "test.txt is missing"),
  (replace("ImageSets/Main/trainval.txt", "2", "1"), "trainval.txt: 000001 listed more than once"),
])
def test_bad_files_of_voc_are_named(root, damage, message):
  make_voc(root)
  damage(root)
  with pytest.raises(ValueError, match=message):
    multilabel.load({"name": "voc", "folder": str(root)})


# NUS-WIDE.

CSV = """filepath,label,split_name
Flickr/a.png,"[sky, dog house]",train
Flickr/b.png,[sea],train
Flickr/c.png,"[sea, cat]",val
Flickr/d.png,[],val
"""


def make_nus_csv(root):
  write(root / "data.csv", CSV)
  write(root / "benchmark_81_v0.json", json.dumps({"test class": ["sea", "cat"]}))
  for i, name in enumerate("abcd"):
    picture(root / f"Flickr/{name}.png", i)


def test_nus_wide_by_the_files_of_ml_decoder(root):
  make_nus_csv(root)
  data = multilabel.load({"name": "nus_wide_csv", "folder": str(root), "size": 8})
  assert data.names == ("cat", "dog house", "sea", "sky") and (data.seen, data.unseen) == ((1, 3), (0, 2))
  assert labels(data, "train") == [["dog house", "sky"], ["sea"]] and labels(data, "test") == [["cat", "sea"], []]
  assert multilabel.with_any(data.train, data.seen).tolist() == [0]  # ML-Decoder's training images
  assert multilabel.with_any(data.test, data.unseen).tolist() == [0]


@pytest.mark.parametrize("damage, message", [
  (replace("data.csv", '[sea],', 'sea,'), "data.csv, line 3: the labels are 'sea'; they must be .label, label."),
  (replace("data.csv", "d.png,[],val", "d.png,[],test"), "data.csv, line 5: the split is 'test'; it must be train or"),
  (replace("data.csv", "d.png", "a.png"), "data.csv: Flickr/a.png listed more than once"),
  (lambda root: write(root / "data.csv", "a,b,c\nFlickr/a.png,[],train"), "data.csv: no image has a label"),
  (lambda root: (root / "benchmark_81_v0.json").unlink(), "there is no .*benchmark_81_v0.json"),
  (lambda root: write(root / "benchmark_81_v0.json", "{"), "benchmark_81_v0.json is no JSON"),
  (lambda root: write(root / "benchmark_81_v0.json", "{}"), 'must hold {"test class": .names.}'),
  (replace("benchmark_81_v0.json", "cat", "cats"), "no image has the label 'cats'. The nearest are 'cat'"),
  (replace("benchmark_81_v0.json", "cat", "sea"), "benchmark_81_v0.json: sea listed more than once"),
  (lambda root: write(root / "benchmark_81_v0.json", '{"test class": ["cat"], "train class": ["cat", "sky"]}'),
   "cat both in train class and test class"),
])
def test_bad_files_of_ml_decoder_are_named(root, damage, message):
  make_nus_csv(root)
  damage(root)
  with pytest.raises(ValueError, match=message):
    multilabel.load({"name": "nus_wide_csv", "folder": str(root)})


TAGS, CONCEPTS = ("nature", "sky", "blue"), ("sky", "map")  # sky is in both, map no tag


def make_nus(root):
  write(root / "NUS_WID_Tags/TagList1k.txt", "\r\n".join(TAGS) + "\r\n")
  write(root / "ConceptsList/Concepts81.txt", "\r\n".join(CONCEPTS) + "\r\n")
  write(root / "ImageList/Imagelist.txt", "x\\1.png\r\nx\\2.png\r\ny\\3.png\r\n")
  write(root / "ImageList/TrainImagelist.txt", "y\\3.png\r\nx\\1.png\r\n")
  write(root / "ImageList/TestImagelist.txt", "x\\2.png\r\n")
  write(root / "NUS_WID_Tags/AllTags1k.txt", "1\t0\t0\t\r\n0\t1\t1\t\r\n1\t1\t0\t\r\n")
  write(root / "Groundtruth/AllLabels/Labels_sky.txt", "0\n1\n0\n")
  write(root / "Groundtruth/AllLabels/Labels_map.txt", "1\n0\n0\n")
  for i, name in enumerate(("x/1", "x/2", "y/3")):
    picture(root / f"Flickr/{name}.png", i)


def test_nus_wide_by_its_original_lists(root):
  make_nus(root)
  data = multilabel.load({"name": "nus_wide", "folder": str(root), "size": 8})
  assert data.names == ("nature", "blue", "sky", "map") and (data.seen, data.unseen) == ((0, 1), (2, 3))
  assert paths(data.train) == ["Flickr/y/3.png", "Flickr/x/1.png"] and paths(data.test) == ["Flickr/x/2.png"]
  # The tag "sky" is no label; annotators say where the sky is.
  assert labels(data, "train") == [["nature"], ["nature", "map"]] and labels(data, "test") == [["blue", "sky"]]
  for path in sorted(root.glob("*/*.txt")):
    path.rename(root / path.name)
  (root / "Groundtruth/AllLabels").rename(root / "AllLabels")
  assert multilabel.fingerprint(multilabel.load({"name": "nus_wide", "folder": str(root), "size": 8})) == (
      multilabel.fingerprint(data))


@pytest.mark.parametrize("damage, message", [
  (replace("NUS_WID_Tags/AllTags1k.txt", "0\t1\t1", "0\t1"), "AllTags1k.txt, line 2 is not 3 times 0 or 1"),
  (replace("NUS_WID_Tags/AllTags1k.txt", "1\t1\t0", "1\t2\t0"), "AllTags1k.txt, line 3 is not 3 times 0 or 1"),
  (replace("Groundtruth/AllLabels/Labels_map.txt", "1\n", "-1130179\n"), "Labels_map.txt, line 1 is not 1 times 0"),
  (replace("Groundtruth/AllLabels/Labels_map.txt", "0\n0\n", "0\n"), "Labels_map.txt has 2 lines, but Imagelist.txt 3"),
  (lambda root: (root / "Groundtruth/AllLabels/Labels_sky.txt").unlink(), "there is no .*Labels_sky.txt; unpack"),
  (lambda root: (root / "ImageList/TestImagelist.txt").unlink(), "there is no .*TestImagelist.txt; unpack"),
  (replace("ImageList/TestImagelist.txt", "2", "9"), "TestImagelist.txt has images that Imagelist.txt lacks: x/9.png"),
  (replace("ImageList/Imagelist.txt", "2", "1"), "Imagelist.txt: x/1.png listed more than once"),
  (lambda root: (root / "Flickr/y/3.png").unlink(), "Flickr/y/3.png .there is no such file"),
])
def test_bad_lists_of_nus_wide_are_named(root, damage, message):
  make_nus(root)
  damage(root)
  with pytest.raises(ValueError, match=message):
    multilabel.load({"name": "nus_wide", "folder": str(root)})


def test_the_labels_of_nus_wide(real_data):
  tags, concepts = nus_wide.read_lists(real_data / "nuswide")
  seen = [tag for tag in tags if tag not in set(concepts)]
  assert seen == (real_data / "nuswide/seen925.txt").read_text().split() and len(seen) == 925
  assert len(tags) == 1000 and len(concepts) == 81 and concepts[0] == "airport"
