"""Augmentation of training pictures: Cutout, then RandAugment, as ML-Decoder trains (arXiv 2111.12933).

The RandAugment is that of PyPI's `randaugment` 1.0.2 (operations, strengths, fill), which no longer runs: a pair of 15
operations with strengths 1 to 9, each applied with probability a half. The libraries that are kept up do not have it:
albumentations (which ended in 2025), augmax, dm-pix and augrs have no RandAugment, imgaug's (of 2020) is another and
needs OpenCV and scikit-image, torchvision and timm need PyTorch. Pillow has every operation: a core augments about
1,500 pictures of 224 pixels a second.

Shapes: b picture, h w pixel, c colour channel (RGB).
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from digzsl_jax.data import pictures

GREY = (128, 128, 128)  # where a moved picture leaves nothing
CUT = (125, 122, 113)  # RandAugment's own cutout


def augment(image_hwc: np.ndarray, seed: Sequence[int]) -> np.ndarray:
  """Another view of a picture, uint8 `[h, w, 3]` as it came.

  Cutout paints a rectangle of half the picture's height and width around a random pixel in one random colour; what is
  beyond the border is lost. RandAugment follows. Its own cutout has 2 to 20 pixels a side whatever the picture's size:
  little at 224 pixels, up to 0.4 of the area at 32, the size that it was made for.

  Args:
    seed: integers from 0 that say which view, such as `(run's seed, epoch, image)`: the same ones give the same view,
      in any thread and process.

  Raises:
    ValueError: it is no uint8 RGB picture.
  """
  if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[2] != 3:
    raise ValueError(f"a picture to augment is {image_hwc.dtype} {list(image_hwc.shape)}: give uint8 [h, w, 3]")
  rng = np.random.default_rng(seed)
  image = Image.fromarray(image_hwc)
  halves = [int(0.5 * side + 0.5) for side in image.size]
  image = _cut(image, halves, tuple(rng.integers(256, size=3).tolist()), rng)
  for name in rng.choice(list(OPERATIONS), 2):
    level = int(rng.integers(1, 10))
    if rng.random() < 0.5:
      image = OPERATIONS[name](image, level, rng)
  return np.asarray(image)


def augment_batch(images_bhwc: np.ndarray, seeds: Sequence[Sequence[int]]) -> np.ndarray:
  """`augment` of each picture with its own seed, in threads.

  Raises:
    ValueError: the pictures are no uint8 RGB, or not as many as seeds.
  """
  if len(images_bhwc) != len(seeds):
    raise ValueError(f"{len(seeds)} seeds for {len(images_bhwc)} pictures: each picture has its own")
  return np.stack(pictures.in_threads(lambda pair: augment(*pair), list(zip(images_bhwc, seeds)), "augmenting"))


def _cut(image: Image.Image, sides: Sequence[int], colour: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
  """Paints `sides` (across, down) pixels around a random one."""
  box = [(centre - side // 2, centre + side // 2) for side, centre in zip(sides, rng.integers(image.size))]
  image.paste(colour, (*(low for low, _ in box), *(high for _, high in box)))  # Pillow clips it
  return image


def _sign(rng: np.random.Generator) -> int:
  return 2 * int(rng.integers(2)) - 1


def _enhance(kind, image, level, rng):
  return kind(image).enhance(1 + level * (0.9 / 9) * _sign(rng))


def _shear(down, image, level, rng):
  by = level * (0.3 / 9) * _sign(rng)
  return _moved(image, (1, 0, 0, by, 1, 0) if down else (1, by, 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _translate(down, image, level, rng):
  by = level * (150 / 331 / 9) * _sign(rng) * image.size[down]
  return _moved(image, (1, 0, 0, 0, 1, by) if down else (1, 0, by, 0, 1, 0), Image.Resampling.NEAREST)


def _moved(image, matrix, resample):
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GREY)


OPERATIONS = {  # `(image, level 1 .. 9, rng) -> image`, in the published order
    "invert": lambda image, level, rng: ImageOps.invert(image),
    "cutout": lambda image, level, rng: _cut(image, [round(level * 20 / 9)] * 2, CUT, rng),
    "sharpness": functools.partial(_enhance, ImageEnhance.Sharpness),
    "autocontrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "posterize": lambda image, level, rng: ImageOps.posterize(image, round(8 - level * 4 / 9)),
    "shear_x": functools.partial(_shear, False),
    "translate_x": functools.partial(_translate, False),
    "translate_y": functools.partial(_translate, True),
    "shear_y": functools.partial(_shear, True),
    "rotate": lambda image, level, rng: image.rotate(level * 30 / 9, fillcolor=GREY),  # one way alone, as published
    "equalize": lambda image, level, rng: ImageOps.equalize(image),
    "contrast": functools.partial(_enhance, ImageEnhance.Contrast),
    "colour": functools.partial(_enhance, ImageEnhance.Color),
    "solarize": lambda image, level, rng: ImageOps.solarize(image, 256 - level * 256 / 9),
    "brightness": functools.partial(_enhance, ImageEnhance.Brightness),
}
