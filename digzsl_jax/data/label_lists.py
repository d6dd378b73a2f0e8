"""Names of labels as prompts take them, and of what else pictures show: their background.

All lists are of github.com/linyq2117/TagCLIP at 512097d: `clip_text.py` is `LISTS`, `CLIP-ES/clip_text.py` is
`CLS_SEG`, whose VOC and COCO lists are those of CLIP-ES (arXiv 2212.09506, github.com/linyq2117/CLIP-ES). COCO-Stuff's
27 groups are the superclasses of its 182 ids (arXiv 1612.03716, github.com/nightrome/cocostuffapi), in the order of IIC
and PiCIE, which is that of TagCLIP's table too.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from digzsl_jax.data import scenes, voc


class LabelList(NamedTuple):
  """The labels of a data set, by column, and the names that take part in the softmax beside them."""

  names: tuple[str, ...]
  background: tuple[str, ...]


# COCO's things by superclass, both in the order of category ids, names in VOC's style where VOC has the class.
_THINGS = {
  "person": ("person",),
  "vehicle": ("bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat"),
  "outdoor": ("traffic light", "fire hydrant", "stop sign", "parking meter", "bench"),
  "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
  "accessory": ("backpack", "umbrella", "handbag", "tie", "suitcase"),
  "sports": ("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
             "surfboard", "tennis racket"),
  "kitchen": ("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
  "food": ("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
  "furniture": ("chair", "sofa", "pottedplant", "bed", "diningtable", "toilet"),
  "electronic": ("tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone"),
  "appliance": ("microwave", "oven", "toaster", "sink", "refrigerator"),
  "indoor": ("book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
}
# COCO-Stuff's stuff; its ids, 92 to 182, are in the alphabetical order of all names.
_STUFF = {
  "ceiling": ("ceiling-other", "ceiling-tile"),
  "floor": ("carpet", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood"),
  "food-stuff": ("food-other", "fruit", "salad", "vegetable"),
  "furniture-stuff": ("cabinet", "counter", "cupboard", "desk-stuff", "door-stuff", "furniture-other", "light",
                      "mirror-stuff", "shelf", "stairs", "table"),
  "raw-material": ("cardboard", "metal", "paper", "plastic"),
  "textile": ("banner", "blanket", "cloth", "clothes", "curtain", "mat", "napkin", "pillow", "rug", "textile-other",
              "towel"),
  "wall": ("wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile", "wall-wood"),
  "window": ("window-blind", "window-other"),
  "building": ("bridge", "building-other", "house", "roof", "skyscraper", "tent"),
  "ground": ("dirt", "gravel", "ground-other", "mud", "pavement", "platform", "playingfield", "railroad", "road",
             "sand", "snow"),
  "plant": ("branch", "bush", "flower", "grass", "leaves", "moss", "plant-other", "straw", "tree"),
  "sky": ("clouds", "sky-other"),
  "solid": ("hill", "mountain", "rock", "solid-other", "stone", "wood"),
  "structural": ("cage", "fence", "net", "railing", "structural-other"),
  "water": ("fog", "river", "sea", "water-other", "waterdrops"),
}
STUFF_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of COCO-Stuff's 182, which count from 1

_VOC_BACKGROUND = ("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea",
                   "railway", "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock",
                   "street", "valley", "bridge", "sign")
# Keyboards and stop signs are classes of COCO.
_COCO_BACKGROUND = tuple(name for name in _VOC_BACKGROUND if name not in ("keyboard", "sign"))


def _renamed(names: Sequence[str], others: Mapping[str, str]) -> tuple[str, ...]:
  return tuple(others.get(name, name) for name in names)


_COCO = tuple(itertools.chain(*_THINGS.values()))
_COCO_STUFF = (*_renamed(_COCO, {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch",
                                 "tvmonitor": "tv"}),
               *sorted(itertools.chain(*_STUFF.values())))

LISTS = {
  "voc": LabelList(voc.NAMES, _VOC_BACKGROUND),
  "coco": LabelList(_COCO, _COCO_BACKGROUND),
  "coco_stuff": LabelList(_COCO_STUFF, ()),
  "scenes": LabelList(scenes.NAMES, ()),
}

_VOC_SYNONYMS = {"bird": "bird avian", "chair": "chair seat", "person": "person with clothes,people,human",
                 "tvmonitor": "tvmonitor screen"}
_COCO_SYNONYMS = {**_VOC_SYNONYMS, "backpack": "backpack,bag", "umbrella": "umbrella,parasol",
                  "handbag": "handbag,purse", "tie": "necktie", "baseball glove": "glove", "spoon": "dessertspoon",
                  "remote": "remote control", "hair drier": "hairdrier,blowdrier"}

# For the template "a clean origami {name}." (`prompts.TEMPLATES["origami"]`).
CLS_SEG = {
  "voc": LabelList(_renamed(voc.NAMES, _VOC_SYNONYMS), _VOC_BACKGROUND),
  # Spelt so where it was published.
  "coco": LabelList(_renamed(_COCO, {**_COCO_SYNONYMS, "snowboard": "sknowboard"}), _COCO_BACKGROUND),
  "coco_stuff": LabelList(_renamed(_COCO_STUFF, {**_COCO_SYNONYMS, "airplane": "aeroplane", "tv": "tvmonitor screen"}),
                          ("background",)),
}

STUFF27_NAMES = ("electronic", "appliance", "food", "furniture", "indoor", "kitchen", "accessory", "animal", "outdoor",
                 "person", "sports", "vehicle", *_STUFF)
_GROUP = {name: group for group, names in _STUFF.items() for name in names}
# For each of the 171 labels its place in `STUFF27_NAMES`.
STUFF27 = tuple(STUFF27_NAMES.index(group) for group in (
  *itertools.chain(*([group] * len(names) for group, names in _THINGS.items())),
  *(_GROUP[name] for name in _COCO_STUFF[len(_COCO):])))
