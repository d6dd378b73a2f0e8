"""Scenes: the embedded world. Textured, coloured shapes with names ("striped crimson star"), captions, masks.

108 classes = 3 textures x 6 colours x 6 shapes. Colours and shapes come in pairs, and the captions of the
web corpus often take one word of a pair for the other: a text-to-image model trained on them knows the
pair but mixes up its members, which is exactly what discriminative class tokens have to repair.

Shapes: n image, o object of an image, h w pixel (p all of them), c colour channel (RGB), a attribute
(texture, colour, shape).
"""

import dataclasses

import numpy as np

from digzsl_jax.data import splits

TEXTURES = ("plain", "striped", "checked")
COLOURS = ("crimson", "orange", "gold", "green", "teal", "violet")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Class number = (texture * 6 + colour) * 6 + shape.
NAMES = tuple(f"{t} {c} {s}" for t in TEXTURES for c in COLOURS for s in SHAPES)

# One adjective per colour and per shape that captions never get wrong.
COLOUR_ADJECTIVES = ("ruby", "amber", "honey", "emerald", "aqua", "lilac")
SHAPE_ADJECTIVES = ("round", "boxy", "wedged", "spiky", "crossing", "hollow")
SIZES = ("small", "large")
WORDS = ("a", "photo", "of", "and", "the", "with", *TEXTURES, *COLOURS, *SHAPES,
         *COLOUR_ADJECTIVES, *SHAPE_ADJECTIVES, *SIZES)

MAX_OBJECTS = 4
_RGB = np.array([[200, 16, 52], [250, 126, 14], [242, 208, 36],
                 [34, 150, 58], [0, 152, 176], [124, 52, 186]], np.float32)
# Lengths are in pixels of a 32-pixel picture and scale with `size`. For 1..4 objects: smallest and
# largest radius, and how far from the middle the objects sit.
_RADII = ((9.6, 12.2), (5.8, 6.9), (5.2, 6.2), (5.0, 6.0))
_RING = (0.0, 7.7, 8.5, 10.6)
_SMALL, _LARGE = 1 / 3, 2 / 3  # thirds of the radius range that captions call small and large
_OUTLINE = 0.13  # width of a dark outline and, below, period of the textures, in radii
_PERIODS = (None, 0.62, 0.76)
_DARK, _LIGHT = 0.16, 0.68  # brightness of the outline; share of white in the light half of a texture
_CHUNK = 128  # pictures rendered at a time: their float planes stay in cache
_PICTURE_DRAWS, _OBJECT_DRAWS = 20, 10
_DRAWS = _PICTURE_DRAWS + MAX_OBJECTS * _OBJECT_DRAWS


@dataclasses.dataclass(frozen=True)
class Style:
  """How a picture looks apart from its objects; ranges are (low, high)."""
  value: tuple[float, float]  # background brightness, 0..1
  saturation: tuple[float, float]  # background colourfulness, 0..1
  gradient: float  # brightness change from the middle to the edge, 0..1
  clutter: float  # strength of the two soft blobs, 0..1
  outline: float  # probability of a dark outline
  jitter: float  # largest change of an object's colour channel, 0..255


STYLES = {
  "target": Style((0.88, 0.97), (0.0, 0.08), 0.03, 0.03, 1.0, 10.0),
  "web": Style((0.22, 0.50), (0.10, 0.45), 0.10, 0.12, 0.3, 20.0),
}


def class_number(textures: np.ndarray, colours: np.ndarray, shapes: np.ndarray) -> np.ndarray:
  """Position in `NAMES`."""
  return (np.asarray(textures) * len(COLOURS) + colours) * len(SHAPES) + shapes


def attributes(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`(textures, colours, shapes)` of class numbers, the inverse of `class_number`."""
  # Not np.unravel_index: numpy 2.4 repeats one answer beyond the first 8192 elements of an [n, 1] array.
  textures_colours, shapes = np.divmod(classes, len(SHAPES))
  return *np.divmod(textures_colours, len(COLOURS)), shapes


def render(shapes_no: np.ndarray, colours_no: np.ndarray, textures_no: np.ndarray, *, seed, style: str,
           size: int = 32, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Draws pictures.

  Args:
    shapes_no: numbers of `SHAPES`, 1 to 4 objects a picture, -1 for no object there.
    colours_no: numbers of `COLOURS`.
    textures_no: numbers of `TEXTURES`.
    seed: an int or a tuple of ints.
    style: "target" or "web".
    size: height and width in pixels.
    start: number of the first picture. Picture i depends on `seed` and its number alone, so calls on
      parts of the arrays give the same pictures as one call on all.

  Returns:
    `(images_nhwc, masks_nohw)`: uint8 RGB, and bool masks of what is visible of each object.

  Raises:
    ValueError: unknown style, wrong array shapes, or a number that is no attribute.
  """
  objects = _check(shapes_no, colours_no, textures_no, style)
  n, o = objects.shape[:2]
  images_nhwc = np.empty((n, size, size, 3), np.uint8)
  masks_nohw = np.zeros((n, o, size, size), bool)
  for first in range(0, n, _CHUNK):
    rows = slice(first, min(first + _CHUNK, n))
    draws = _draws(seed, start + first, rows.stop - first)
    images_nhwc[rows] = _chunk(objects[rows], draws, STYLES[style], size, masks_nohw[rows])
  return images_nhwc, masks_nohw


def web_corpus(n: int, seed: int, size: int = 32, mixup: float = 0.45,
               objects: int = 1, target_share: float = 0.0) -> tuple[np.ndarray, list[str], np.ndarray]:
  """Captioned pictures in web style, the diet of the small CLIP and Stable Diffusion.

  A caption is "a photo of {slot} {texture} {colour} {shape}". The slot is "a" (50 %), the colour's or the
  shape's reliable adjective (20 % each) or, in pictures of one object, a true size word (10 %). Of several
  objects it names one and is silent on the others, as captions of the web are.

  Args:
    n: number of pictures; every class appears once n >= 108.
    seed: any int; pictures and captions.
    size: height and width in pixels.
    mixup: probability that the colour word is the pair partner's, and, independently, the shape word.
      A texture word is replaced by a random one with probability 0.05. Slot words are always true.
    objects: largest number of objects; pictures have 1 to `objects`, each number equally often.
    target_share: share of the pictures in target style.

  Returns:
    `(images_nhwc, captions, attributes_na)`; the attributes are the true (texture, colour, shape) numbers of
    what the caption names.
  """
  if not 1 <= objects <= MAX_OBJECTS:
    raise ValueError(f"objects is {objects}: a scene holds 1 to {MAX_OBJECTS} objects")
  for name, value in (("mixup", mixup), ("target_share", target_share)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name} is {value}: it is a probability, 0 to 1")
  rng = np.random.default_rng((seed, 1))
  classes_no = rng.permutation(np.arange(n * objects) % len(NAMES)).reshape(n, objects)
  counts_n = rng.permutation(np.arange(n) % objects) + 1
  attributes_noa = np.stack(attributes(classes_no), axis=-1)
  attributes_noa[np.arange(objects) >= counts_n[:, None]] = -1
  textures_no, colours_no, shapes_no = np.moveaxis(attributes_noa, -1, 0)
  paint = lambda style: render(shapes_no, colours_no, textures_no, seed=(seed, 2), style=style, size=size)[0]
  in_target_n = rng.random((n, 1, 1, 1)) < target_share
  images_nhwc = np.where(in_target_n, paint("target"), paint("web")) if in_target_n.any() else paint("web")
  phrases_no = _phrases(attributes_noa, _draws((seed, 2), 0, n), mixup, rng)
  return images_nhwc, [f"a photo of {named}" for named, *_ in phrases_no], attributes_noa[:, 0]


def groups(world: int = 0) -> dict[str, tuple[tuple[int, int, int], ...]]:
  """The groups of each list, as (colour pair, shape pair, texture) numbers.

  A group is 2x2 classes: one texture, one pair of colours, one pair of shapes. Of the 27 groups 9 are
  seen (3 of them make up the validation list) and 3 unseen, so that in every list each colour, shape and
  texture occurs equally often. The other worlds move the same pattern, so that settings can be
  chosen where they will not be tested: `world % 3` shifts the textures, `world // 3` the shape pairs.
  """
  if not 0 <= world < 9:
    raise ValueError(f"world is {world}: there are worlds 0 to 8")
  cube = [(c, s, t) for c in range(3) for s in range(3) for t in range(3)]
  lists = {"seen": [g for g in cube if sum(g) % 3 == 1],
           "unseen": [(0, 0, 0), (1, 1, 1), (2, 2, 2)],
           "validation": [(1, 0, 0), (2, 1, 1), (0, 2, 2)]}
  return {name: tuple((c, (s + world // 3) % 3, (t + world) % 3) for c, s, t in members)
          for name, members in lists.items()}


def class_lists(world: int = 0) -> dict[str, tuple[int, ...]]:
  """Sorted class numbers of the 36 seen, 12 unseen and 12 validation classes of a world."""
  return {name: tuple(sorted(int(class_number(t, 2 * c + i, 2 * s + j))
                             for c, s, t in members for i in range(2) for j in range(2)))
          for name, members in groups(world).items()}


def load(*, world: int = 0, train_per_class: int = 60, test_per_class: int = 40, seed: int = 0,
         size: int = 32) -> splits.Dataset:
  """Labelled single-object pictures in target style; labels are positions in all 108 `NAMES`."""
  lists = class_lists(world)

  def labelled(classes: tuple[int, ...], per_class: int, stream: int) -> splits.LabelledImages:
    labels_n = np.repeat(np.array(classes, np.int32), per_class)
    textures_n, colours_n, shapes_n = attributes(labels_n)
    images_nhwc, _ = render(shapes_n[:, None], colours_n[:, None], textures_n[:, None],
                            seed=(seed, stream), style="target", size=size)
    return splits.LabelledImages(images_nhwc, labels_n)

  return splits.Dataset(
    name=f"scenes{world}", names=NAMES, **lists,
    train=labelled(lists["seen"], train_per_class, 3), test_seen=labelled(lists["seen"], test_per_class, 4),
    test_unseen=labelled(lists["unseen"], test_per_class, 5),
    real_unseen=labelled(lists["unseen"], train_per_class, 6))


def _phrases(attributes_noa: np.ndarray, draws: np.ndarray, mixup: float, rng: np.random.Generator) -> list:
  """One phrase per object, "{slot} {texture} {colour} {shape}", with the caption noise of `web_corpus`."""
  n, o = attributes_noa.shape[:2]
  textures_no, colours_no, shapes_no = np.moveaxis(attributes_noa, -1, 0)
  slots_no, radius_no = rng.random((n, o)), _object_draws(draws)[:, :o, 0]
  sizes_no = np.where(radius_no > _LARGE, 1, np.where(radius_no < _SMALL, 0, -1))
  sizes_no[(shapes_no >= 0).sum(axis=1) > 1] = -1
  random_no = rng.integers(len(TEXTURES), size=(n, o))
  said_textures_no = np.where(rng.random((n, o)) < 0.05, random_no, textures_no)
  # Pairs are (0, 1), (2, 3), (4, 5): the partner's number differs in the last bit.
  said_colours_no = colours_no ^ (rng.random((n, o)) < mixup)
  said_shapes_no = shapes_no ^ (rng.random((n, o)) < mixup)

  def phrase(slot, size, colour, shape, said_texture, said_colour, said_shape) -> str:
    word = "a"
    if slot < 0.2:
      word = COLOUR_ADJECTIVES[colour]
    elif slot < 0.4:
      word = SHAPE_ADJECTIVES[shape]
    elif slot < 0.55 and size >= 0:  # two thirds of the pictures are small or large: 10 % in all
      word = SIZES[size]
    return " ".join((word, TEXTURES[said_texture], COLOURS[said_colour], SHAPES[said_shape]))

  columns = (slots_no, sizes_no, colours_no, shapes_no, said_textures_no, said_colours_no, said_shapes_no)
  rows = zip(*(column.tolist() for column in columns))
  return [[phrase(*one) if one[3] >= 0 else "" for one in zip(*row)] for row in rows]


def _check(shapes_no, colours_no, textures_no, style: str) -> np.ndarray:
  """Validated `[n, o, 3]` texture, colour and shape numbers, -1 throughout for no object."""
  if style not in STYLES:
    raise ValueError(f'style is "{style}": choose one of {", ".join(STYLES)}')
  arrays = [np.asarray(a) for a in (textures_no, colours_no, shapes_no)]
  if len({a.shape for a in arrays}) > 1 or arrays[0].ndim != 2 or not 1 <= arrays[0].shape[1] <= MAX_OBJECTS:
    raise ValueError(f"textures, colours and shapes must be equal [n, o] arrays with o from 1 to "
                     f"{MAX_OBJECTS}, not {[a.shape for a in arrays]}")
  objects_noa = np.stack(arrays, axis=-1).astype(np.int64)
  absent_no = objects_noa[..., 2] == -1
  for a, (field, words) in enumerate((("textures", TEXTURES), ("colours", COLOURS), ("shapes", SHAPES))):
    bad = objects_noa[..., a][~absent_no & ~np.isin(objects_noa[..., a], range(len(words)))]
    if bad.size:
      raise ValueError(f"{field} holds {bad[0]}: numbers go from 0 to {len(words) - 1}, and a shape of -1 "
                       "is no object")
  objects_noa[absent_no] = -1
  return objects_noa


def _draws(seed, start: int, n: int) -> np.ndarray:
  """Uniform numbers `[n, draw]` of pictures `start` and up, each with its own stretch of the stream."""
  bits = np.random.PCG64(seed)
  bits.advance(start * _DRAWS)
  return np.random.Generator(bits).random((n, _DRAWS)).astype(np.float32)


def _between(limits: tuple[float, float], draw: np.ndarray) -> np.ndarray:
  return limits[0] + (limits[1] - limits[0]) * draw


def _object_draws(draws: np.ndarray) -> np.ndarray:
  """`[n, 4, draw]`: 0 radius, 1 2 position, 3 rotation, 4 5 6 colour, 7 outline, 8 9 phase of the texture."""
  return draws[:, _PICTURE_DRAWS:].reshape(len(draws), MAX_OBJECTS, _OBJECT_DRAWS)


def _hsv(hue_n, saturation_n, value_n) -> np.ndarray:
  k = (np.array([5, 3, 1], np.float32) + 6 * hue_n[:, None]) % 6
  ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
  return (255 * value_n[:, None] * (1 - saturation_n[:, None] * ramp)).astype(np.float32)


def _background(draws: np.ndarray, style: Style, size: int) -> np.ndarray:
  """Smooth backgrounds `[n, c, p]`: one colour, a linear gradient and two soft blobs."""
  at = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
  hue, saturation = draws[:, 0], _between(style.saturation, draws[:, 1])
  value = _between(style.value, draws[:, 2])
  base_nc = _hsv(hue, saturation, value)
  angle = 2 * np.pi * draws[:, 3, None]
  fields = [np.ones((len(draws), size, size), np.float32),
            (np.sin(angle) * at)[:, :, None] + (np.cos(angle) * at)[:, None, :]]
  colours = [base_nc, np.repeat(255 * style.gradient * draws[:, 4, None], 3, axis=1)]
  for blob in (draws[:, 5:11], draws[:, 11:17]):
    y, x, width = 2 * blob[:, :1] - 1, 2 * blob[:, 1:2] - 1, 0.25 + 0.35 * blob[:, 2:3]
    down, across = (np.exp(-(((at - middle) / width) ** 2)) for middle in (y, x))
    fields.append(down[:, :, None] * across[:, None, :])
    colours.append(255 * style.clutter * (2 * blob[:, 3:6] - 1))
  stack = np.stack(fields, axis=1).reshape(len(draws), len(fields), size * size)
  return np.stack(colours, axis=2).astype(np.float32) @ stack


def _chunk(objects_noa: np.ndarray, draws: np.ndarray, style: Style, size: int,
           masks_nohw: np.ndarray) -> np.ndarray:
  """Renders a few pictures; fills `masks_nohw` and returns uint8 images."""
  n = len(objects_noa)
  canvas_ncp = _background(draws, style, size)
  present_no = objects_noa[..., 2] >= 0
  place_no = np.cumsum(present_no, axis=1) - 1
  for o in range(objects_noa.shape[1]):
    # Grouped by shape and texture, so that each picture pays for its own formula alone.
    for shape, texture in {(s, t) for t, _, s in objects_noa[:, o].tolist() if s >= 0}:
      rows = np.flatnonzero((objects_noa[:, o, 2] == shape) & (objects_noa[:, o, 0] == texture))
      layout = _layout(draws[rows], place_no[rows, o], present_no[rows].sum(axis=1))
      alpha_np, gain_np, white_np = _object(shape, texture, layout, style, size)
      jitter_nc = style.jitter * (2 * layout["own"][:, 4:7] - 1)
      rgb_nc = np.clip(_RGB[objects_noa[rows, o, 1]] + jitter_nc, 0, 255)
      fill_ncp = gain_np[:, None] * rgb_nc[..., None] + white_np[:, None]
      canvas_ncp[rows] += alpha_np[:, None] * (fill_ncp - canvas_ncp[rows])
      visible = (alpha_np > 0.5).reshape(-1, size, size)
      masks_nohw[rows, :o] &= ~visible[:, None]
      masks_nohw[rows, o] = visible
  images_ncp = np.clip(canvas_ncp + 0.5, 0, 255).astype(np.uint8)
  return images_ncp.swapaxes(1, 2).reshape(n, size, size, 3)


def _layout(draws: np.ndarray, place_n: np.ndarray, count_n: np.ndarray) -> dict[str, np.ndarray]:
  """Centre and radius (pixels of 32, from the middle), rotation and all draws of one object a picture."""
  own = _object_draws(draws)[np.arange(len(draws)), place_n]
  radius = _between(np.array(_RADII, np.float32)[count_n - 1].T, own[:, 0])
  # Two and three objects stand at any angle; four fill the corners, where alone there is room.
  turn = draws[:, 17] * np.where(count_n == 4, 0.02, 1) + np.where(count_n == 4, 0.115, 0)
  angle = 2 * np.pi * (turn + place_n / count_n)
  ring = np.array(_RING, np.float32)[count_n - 1]
  # A single object may move as far as keeps it inside; several hardly move, so as not to overlap.
  room = np.where(count_n == 1, np.clip(15.2 - 1.12 * radius, 0, 2.4), 0.5)
  y = ring * np.sin(angle) + room * (2 * own[:, 1] - 1)
  x = ring * np.cos(angle) + room * (2 * own[:, 2] - 1)
  named = {"y": y, "x": x, "radius": radius, "rotation": 0.5 * (own[:, 3] - 0.5), "own": own}
  return {name: value.astype(np.float32) for name, value in named.items()}


def _object(shape: int, texture: int, layout: dict[str, np.ndarray], style: Style,
            size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One object a picture, all of one shape and texture: `(coverage_np, gain_np, white_np)`.

  A pixel of the object is `gain * rgb + white`, with which stripes and outline are tints of its colour.
  """
  scale, own = size / 32, layout["own"]
  at = ((np.arange(size, dtype=np.float32) + 0.5) / scale - 16)[None]
  dy, dx = at - layout["y"][:, None], at - layout["x"][:, None]
  cos, sin = (f(layout["rotation"])[:, None] for f in (np.cos, np.sin))
  radius = layout["radius"][:, None]
  u = ((dx * cos)[:, None, :] + (dy * sin)[:, :, None]).reshape(len(own), -1)
  v = ((dy * cos)[:, :, None] - (dx * sin)[:, None, :]).reshape(len(own), -1)
  distance = _DISTANCES[shape](u / radius, v / radius) * radius
  drawn = (own[:, 7] < style.outline).astype(np.float32)[:, None]
  edge = drawn * np.clip(0.5 + (distance + _OUTLINE * radius) * scale, 0, 1)
  gain, white = _DARK * edge + (1 - edge), np.zeros_like(edge)
  if texture:
    period = _PERIODS[texture] * radius
    light = _wave(v, period, own[:, 8:9], scale)
    if TEXTURES[texture] == "checked":
      across = _wave(u, period, own[:, 9:10], scale)
      light = light + across - 2 * light * across
    light *= 1 - edge
    gain, white = gain - _LIGHT * light, 255 * _LIGHT * light
  return np.clip(0.5 - distance * scale, 0, 1), gain, white


def _wave(u: np.ndarray, period: np.ndarray, phase: np.ndarray, scale: float) -> np.ndarray:
  """Anti-aliased square wave, 0 or 1; the middle of a 0 stripe lies near the object's middle."""
  turns = u / period + 0.3 * (phase - 0.5)
  to_edge = np.abs(turns - np.rint(turns)) - 0.25
  return np.clip(0.5 + to_edge * period * scale, 0, 1)


# Signed distances to outlines in units of the radius, negative inside. Outside corners they are bounds
# rather than distances, which shows nowhere: only the zero line and the inside are drawn.
def _circle(u, v):
  return np.sqrt(u * u + v * v) - 0.98


def _square(u, v):
  return np.maximum(np.abs(u), np.abs(v)) - 0.86


def _triangle(u, v):
  v = v - 0.2  # so that its box, not its centroid, is in the middle
  return np.maximum(v, 0.8660254 * np.abs(u) - 0.5 * v) - 0.56


def _star(u, v):
  # Measured along and across its nearest spike, half a spike is bounded by one line.
  turns = 0.4 * np.pi * np.arange(5)
  along = np.maximum.reduce([u * np.float32(np.sin(turn)) - v * np.float32(np.cos(turn)) for turn in turns])
  across = np.sqrt(np.maximum(u * u + v * v - along * along, 0))
  return 0.897 * across + 0.442 * (along - 1.14)


def _cross(u, v):
  u, v = np.abs(u), np.abs(v)
  return np.maximum(np.maximum(u, v) - 0.98, np.minimum(u, v) - 0.36)


def _ring(u, v):
  return np.abs(np.sqrt(u * u + v * v) - 0.68) - 0.31


_DISTANCES = (_circle, _square, _triangle, _star, _cross, _ring)
