"""Masks as files and pictures: from the maps of patches to labels of pixels, and what a person looks at.

A map of labels holds the column of a label, or BACKGROUND. In files it is 0 for background and column + 1 for a label,
as in VOC's.

Shapes: n labels of a picture, i j patch, h w pixel, k what a pixel chooses from (background first, if it is one of
these, then the labels), v colour of a palette, c colour channel (RGB).
"""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from digzsl_jax.files import write_atomic

BACKGROUND = -1
BYTES = 256  # values that a PNG with a palette can hold
OPAQUE = 0.5  # of a mask over a picture
READABLE = 256  # pixels that an overlay's longer side has at least
# Of the released code (github.com/linyq2117/TagCLIP, CLIP-ES/eval_cam_with_crf.py).
CRF_ROUNDS = 10
CRF_NEAR = dict(sxy=1, compat=3)  # reach in pixels and weight
CRF_ALIKE = dict(sxy=67, srgb=3, compat=4)  # and reach in colour
CRF_LEAST = 1e-5  # probability


def class_maps(cams_nij: np.ndarray, size: tuple[int, int], background: bool) -> np.ndarray:
  """Maps of patches as maps of pixels, float32 `[k, h, w]`.

  Bilinear, pixel centres at halves, the border repeated, as OpenCV's `resize` and PyTorch's `align_corners=False`.

  Args:
    cams_nij: 0 to 1, of the picture's own patches: what pads it in a batch is cut off before.
    size: height and width of the picture.
    background: whether it is one of the choices, with 1 - the highest map (published for VOC and COCO, and not for
      COCO-Stuff).
  """
  height, width = size
  maps_khw = np.empty((len(cams_nij) + background, height, width), np.float32)
  for map_hw, cam_ij in zip(maps_khw[int(background):], cams_nij):
    image = Image.fromarray(np.ascontiguousarray(cam_ij, np.float32))
    map_hw[:] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
  if background:
    maps_khw[0] = 1 - maps_khw[1:].max(0, initial=0)
  return maps_khw


def label_map(maps_khw: np.ndarray, labels_n: Sequence[int]) -> np.ndarray:
  """The highest of the maps at each pixel, int16 `[h, w]`: columns of labels, or BACKGROUND; the first of equals.

  Args:
    maps_khw: of `class_maps`, refined or not.
    labels_n: columns of the labels, in their order; background is one of the maps where there is one more of these.

  Raises:
    ValueError: maps and labels that do not go together.
  """
  background = len(maps_khw) - len(labels_n)
  if background not in (0, 1) or not len(maps_khw):
    raise ValueError(f"{len(maps_khw)} maps for {len(labels_n)} labels: there is one for each, and one more for "
                     "background or none")
  return np.array([BACKGROUND] * background + list(labels_n), np.int16)[maps_khw.argmax(0)]


def labels_of(cams_nij: np.ndarray, labels_n: Sequence[int], size: tuple[int, int], unlabelled: bool,
              image_hwc: np.ndarray | None) -> np.ndarray:
  """`class_maps` to `label_map`, int16 `[h, w]`; a picture without labels is all background.

  Args:
    unlabelled: whether a pixel may show no label.
    image_hwc: the picture in this size, for a CRF between the two; None for none.
  """
  maps_khw = class_maps(cams_nij, size, unlabelled or not len(labels_n))
  return label_map(maps_khw if image_hwc is None else refine_crf(maps_khw, image_hwc), labels_n)


def check_crf() -> None:
  """Raises ValueError at once, and not after hours, if `refine_crf` cannot work here."""
  refine_crf(np.full((2, 4, 4), 0.5, np.float32), np.zeros((4, 4, 3), np.uint8))


def refine_crf(maps_khw: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
  """Probabilities of a fully connected CRF (arXiv 1210.5644) with `maps_khw` as its unary term, `[k, h, w]`.

  The released code subtracts a mean colour from the picture and then makes bytes of it, so that what is darker wraps
  around to be bright; here the picture is taken as it is.

  Args:
    image_hwc: uint8.

  Raises:
    ValueError: pydensecrf2 is not installed, or another size of the picture.
  """
  try:
    from pydensecrf import densecrf
  except ImportError as error:
    raise ValueError("masks are refined by a CRF with pydensecrf2, which is not installed: pip install "
                     "'digzsl_jax[crf]' (it needs a C++ compiler), or do without") from error
  k, height, width = maps_khw.shape
  if image_hwc.shape != (height, width, 3) or image_hwc.dtype != np.uint8:
    raise ValueError(f"the picture is {image_hwc.dtype} {list(image_hwc.shape)} and its maps are {height}x{width}: it "
                     f"is uint8 [{height}, {width}, 3]")
  field = densecrf.DenseCRF2D(width, height, k)
  unary = -np.log(np.clip(np.array(maps_khw, np.float32, order="C"), CRF_LEAST, 1))
  field.setUnaryEnergy(unary.reshape(k, -1))
  field.addPairwiseGaussian(**CRF_NEAR)
  field.addPairwiseBilateral(rgbim=np.array(image_hwc, order="C"), **CRF_ALIKE)  # it insists on writable memory
  return np.array(field.inference(CRF_ROUNDS), np.float32).reshape(k, height, width)


def palette(colours: int = BYTES) -> np.ndarray:
  """VOC's, uint8 `[v, c]`: the bits of a number in turn are the highest bits of red, green and blue, then the next."""
  numbers_v = np.arange(colours)
  colours_vc = np.zeros((colours, 3), np.int64)
  for bit in range(8):
    colours_vc |= (numbers_v[:, None] >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
  return colours_vc.astype(np.uint8)


def write_palette_png(path: str | os.PathLike, labels_hw: np.ndarray, palette_vc: np.ndarray) -> None:
  """Writes a map of labels atomically: 0 for background, column + 1 for a label.

  With more than 256 colours, too many for a PNG with a palette, all maps are 16-bit grey; the numbers are the same.

  Args:
    labels_hw: of `label_map`.
    palette_vc: uint8, a colour for background and for each label of the data set.

  Raises:
    ValueError: a label without colour.
    OSError: the file could not be written.
  """
  values_hw = np.asarray(labels_hw).astype(np.int64) - BACKGROUND
  if values_hw.size and not (values_hw.min() >= 0 and values_hw.max() < len(palette_vc)):
    raise ValueError(f"{path}: labels are from {values_hw.min() - 1} to {values_hw.max() - 1}, and a palette of "
                     f"{len(palette_vc)} colours has them from -1 to {len(palette_vc) - 2}: give it one for each")
  if len(palette_vc) > BYTES:
    image = Image.fromarray(values_hw.astype(np.uint16))
  else:
    image = Image.fromarray(values_hw.astype(np.uint8)).convert("P")
    image.putpalette(np.asarray(palette_vc, np.uint8).tobytes())
  write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))


def overlay(image_hwc: np.ndarray, labels_hw: np.ndarray, names: Sequence[str], palette_vc: np.ndarray) -> np.ndarray:
  """A picture under its masks, with their outlines, and a legend below: uint8 `[h', w', c]`.

  A picture too small to read names under it is enlarged by a whole factor.

  Args:
    image_hwc: uint8.
    labels_hw: of `label_map`.
    names: of all labels, by column.
    palette_vc: as of `write_palette_png`.

  Raises:
    ValueError: a map of another size than the picture.
  """
  if labels_hw.shape != image_hwc.shape[:2]:
    raise ValueError(f"labels of {'x'.join(map(str, labels_hw.shape))} pixels for a picture of "
                     f"{'x'.join(map(str, image_hwc.shape[:2]))}")
  times = max(1, READABLE // max(labels_hw.shape))
  labels_hw, image_hwc = (x.repeat(times, 0).repeat(times, 1) for x in (labels_hw, image_hwc))
  said_hw = labels_hw != BACKGROUND
  colours_hwc = palette_vc[labels_hw.astype(np.int64) - BACKGROUND]
  blended_hwc = np.where(said_hw[..., None], (1 - OPAQUE) * image_hwc + OPAQUE * colours_hwc, image_hwc)
  thick = 1 + max(labels_hw.shape) // 400
  outline_hw = _borders(labels_hw, thick)
  # White around the colour: outlines are seen on pictures of their own colour, too.
  blended_hwc = np.where(_borders(labels_hw, thick + 1)[..., None], 255, blended_hwc)
  blended_hwc = np.where((outline_hw & said_hw)[..., None], colours_hwc, blended_hwc).round().astype(np.uint8)
  present = [int(label) for label in np.unique(labels_hw) if label != BACKGROUND]
  if not present:
    return blended_hwc
  entries = [(names[label], tuple(palette_vc[label - BACKGROUND].tolist())) for label in present]
  return np.concatenate([blended_hwc, _legend(entries, labels_hw.shape)])


def _borders(labels_hw: np.ndarray, reach: int) -> np.ndarray:
  """Pixels with another label within `reach` pixels up, down, left or right."""
  found_hw = np.zeros(labels_hw.shape, bool)
  for step in range(1, reach + 1):
    down_hw, across_hw = labels_hw[step:] != labels_hw[:-step], labels_hw[:, step:] != labels_hw[:, :-step]
    found_hw[step:] |= down_hw
    found_hw[:-step] |= down_hw
    found_hw[:, step:] |= across_hw
    found_hw[:, :-step] |= across_hw
  return found_hw


def _legend(entries: Sequence[tuple[str, tuple[int, ...]]], size: tuple[int, int]) -> np.ndarray:
  """Names beside patches of their colours on white, as wide as the picture and as many lines as it takes."""
  width = size[1]
  text = max(10, min(max(size) // 36, 24))
  font, line, gap = ImageFont.load_default(text), round(1.5 * text), text // 2

  def fitted(name: str) -> str:
    """As much of it as one line has room for."""
    room, kept = width - text - 3 * gap, name
    while kept and font.getlength(kept if kept == name else f"{kept}..") > room:
      kept = kept[:-1]
    return kept if kept == name else f"{kept}.."

  places, x, y = [], gap, 0
  for name, colour in entries:
    name = fitted(name)
    wide = text + gap + round(font.getlength(name))
    if x > gap and x + wide + gap > width:
      x, y = gap, y + line
    places.append((x, y, name, colour))
    x += wide + 2 * gap
  strip = Image.new("RGB", (width, y + line), "white")
  draw = ImageDraw.Draw(strip)
  for x, y, name, colour in places:
    top = y + (line - text) // 2
    draw.rectangle((x, top, x + text - 1, top + text - 1), fill=colour, outline="black")
    draw.text((x + text + gap, y + line // 2), name, fill="black", font=font, anchor="lm")
  return np.asarray(strip)
