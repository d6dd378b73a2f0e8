"""Names that prompts take, the groups of COCO-Stuff, VOC's colours."""

import numpy as np
import pytest

from digzsl_jax import mask_files
from digzsl_jax.data import coco, label_lists, prompts, scenes, voc

# The superclass of each stuff id, 92 to 182, as TagCLIP's and PiCIE's tables number them, from 12 on.
STUFF_GROUPS = """17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22
  21 21 24 20 22 15 17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22
  25 15 20 17 17 22 14 18 18 18 18 18 18 18 26 26 19 19 24"""


def ids():
  """COCO-Stuff's ids of the 171 labels."""
  return [i for i in range(1, 183) if i not in label_lists.STUFF_UNUSED_IDS]


@pytest.mark.parametrize("name, labels, background", [("voc", 20, 25), ("coco", 80, 23), ("coco_stuff", 171, 0),
                                                      ("scenes", 108, 0)])
def test_lists_have_the_published_sizes(name, labels, background):
  found = label_lists.LISTS[name]
  assert (len(set(found.names)), len(set(found.background))) == (len(found.names), len(found.background))
  assert (len(found.names), len(found.background)) == (labels, background)
  assert not set(found.names) & set(found.background)
  for text in (*found.names, *found.background):
    assert prompts.class_name(text) == text


def test_names_are_in_the_order_of_ids():
  names = label_lists.LISTS["coco"].names
  certain = {0: "person", 3: "motorbike", 4: "aeroplane", 14: "bird", 32: "sports ball", 39: "bottle", 46: "banana",
             57: "sofa", 58: "pottedplant", 60: "diningtable", 62: "tvmonitor", 73: "book", 79: "toothbrush"}
  assert {column: names[column] for column in certain} == certain
  assert set(voc.NAMES) < set(names)
  stuff = dict(zip(ids(), label_lists.LISTS["coco_stuff"].names, strict=True))
  certain = {1: "person", 4: "motorcycle", 5: "airplane", 25: "giraffe", 27: "backpack", 63: "couch",
             64: "pottedplant", 67: "diningtable", 72: "tv", 90: "toothbrush", 92: "banner", 106: "clouds",
             118: "floor-wood", 119: "flower", 124: "grass", 149: "road", 157: "sky-other", 169: "tree",
             178: "water-other", 179: "waterdrops", 182: "wood"}
  assert {i: stuff[i] for i in certain} == certain
  assert label_lists.LISTS["scenes"].names == scenes.NAMES


def test_names_of_coco_differ_from_its_own_in_style_alone(real_data):
  """Its 80 names by id, from another source."""
  own = (real_data / "coco256/classes.txt").read_text().split("\n")[:80]
  others = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
            "dining table": "diningtable", "tv": "tvmonitor"}
  assert tuple(others.get(name, name) for name in own) == label_lists.LISTS["coco"].names
  assert set(coco.UNSEEN["65/15"]) < set(own)


def test_synonyms_stand_where_the_names_stood():
  for name, found in label_lists.CLS_SEG.items():
    plain = label_lists.LISTS[name]
    changed = {old: new for old, new in zip(plain.names, found.names, strict=True) if old != new}
    assert found.background == (plain.background or ("background",))
    assert changed.pop("person") == "person with clothes,people,human" and changed.pop("bird") == "bird avian"
    assert changed.pop("chair") == "chair seat"
    assert changed.pop("tv" if name == "coco_stuff" else "tvmonitor") == "tvmonitor screen"
    if name == "voc":
      assert not changed
      continue
    assert changed.pop("airplane" if name == "coco_stuff" else "snowboard") in ("aeroplane", "sknowboard")
    assert changed == {"backpack": "backpack,bag", "umbrella": "umbrella,parasol", "handbag": "handbag,purse",
                       "tie": "necktie", "baseball glove": "glove", "spoon": "dessertspoon",
                       "remote": "remote control", "hair drier": "hairdrier,blowdrier"}


def test_groups_of_coco_stuff():
  names, groups = label_lists.LISTS["coco_stuff"].names, label_lists.STUFF27_NAMES
  assert len(set(groups)) == 27 and len(label_lists.STUFF27) == 171 and set(label_lists.STUFF27) == set(range(27))
  assert label_lists.STUFF27[80:] == tuple(map(int, STUFF_GROUPS.split()))
  group = {name: groups[place] for name, place in zip(names, label_lists.STUFF27, strict=True)}
  certain = {"person": "person", "truck": "vehicle", "bench": "outdoor", "giraffe": "animal", "tie": "accessory",
             "kite": "sports", "bowl": "kitchen", "cake": "food", "toilet": "furniture", "cell phone": "electronic",
             "sink": "appliance", "book": "indoor", "carpet": "floor", "rug": "textile", "fog": "water",
             "cage": "structural", "straw": "plant", "salad": "food-stuff", "bridge": "building", "wood": "solid",
             "door-stuff": "furniture-stuff", "window-blind": "window", "railroad": "ground", "clouds": "sky"}
  assert {name: group[name] for name in certain} == certain
  # Things by id: one person, 8 vehicles (ids 2 to 9), 10 animals (16 to 25), ...
  assert np.bincount(label_lists.STUFF27[:80]).tolist() == [6, 5, 10, 6, 7, 7, 5, 10, 5, 1, 10, 8]


def test_colours_of_voc():
  palette = mask_files.palette()
  assert palette.shape == (256, 3) and palette.dtype == np.uint8 and len(np.unique(palette, axis=0)) == 256
  certain = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128),
             20: (0, 64, 128), 255: (224, 224, 192)}
  assert {index: tuple(palette[index].tolist()) for index in certain} == certain
