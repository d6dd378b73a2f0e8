"""The embedded world: what is drawn, what is said of it, and how its classes are divided."""

import collections

import numpy as np
import pytest

from digzsl_jax.data import scenes


def _random(n: int, objects: int, seed: int = 0):
  textures, colours, shapes = scenes.attributes(
    np.random.default_rng(seed).integers(len(scenes.NAMES), size=(n, objects)))
  return shapes.copy(), colours, textures


def test_names_follow_class_numbers():
  numbers = np.arange(len(scenes.NAMES))
  textures, colours, shapes = scenes.attributes(numbers)
  assert len(scenes.NAMES) == 108
  np.testing.assert_array_equal(scenes.class_number(textures, colours, shapes), numbers)
  for k in (0, 41, 107):
    assert scenes.NAMES[k] == (f"{scenes.TEXTURES[textures[k]]} {scenes.COLOURS[colours[k]]} "
                               f"{scenes.SHAPES[shapes[k]]}")


@pytest.mark.parametrize("style", scenes.STYLES)
def test_pictures_do_not_depend_on_how_they_are_asked_for(style):
  shapes, colours, textures = _random(150, 3)
  shapes[::3, 1:] = -1
  whole, masks = scenes.render(shapes, colours, textures, seed=5, style=style)
  again, _ = scenes.render(shapes, colours, textures, seed=5, style=style)
  np.testing.assert_array_equal(whole, again)
  for rows in (slice(0, 7), slice(7, 140), slice(140, 150)):
    part, part_masks = scenes.render(shapes[rows], colours[rows], textures[rows], seed=5, style=style,
                                     start=rows.start)
    np.testing.assert_array_equal(part, whole[rows])
    np.testing.assert_array_equal(part_masks, masks[rows])
  other, _ = scenes.render(shapes, colours, textures, seed=6, style=style)
  assert (other != whole).any(axis=(1, 2, 3)).all()


def test_absent_objects_leave_no_trace():
  shapes, colours, textures = _random(20, 1)
  alone, mask = scenes.render(shapes, colours, textures, seed=1, style="web")
  gaps = np.full((20, 3), -1)
  padded = [gaps.copy() for _ in range(3)]
  for array, own in zip(padded, (shapes, colours, textures)):
    array[:, 1:2] = own
  image, masks = scenes.render(*padded, seed=1, style="web")
  np.testing.assert_array_equal(image, alone)
  np.testing.assert_array_equal(masks[:, 1:2], mask)
  assert not masks[:, [0, 2]].any()


@pytest.mark.parametrize("objects", [1, 2, 3, 4])
def test_masks_are_visible_disjoint_and_inside(objects):
  shapes, colours, textures = _random(400, objects)
  images, masks = scenes.render(shapes, colours, textures, seed=2, style="target")
  assert images.shape == (400, 32, 32, 3) and images.dtype == np.uint8
  assert masks.shape == (400, objects, 32, 32) and masks.dtype == bool
  assert masks.sum(axis=1).max() == 1  # a pixel shows one object
  area = masks.sum(axis=(2, 3))
  assert area.min() > (90 if objects == 1 else 15)
  edge = np.ones((32, 32), bool)
  edge[1:-1, 1:-1] = False
  assert masks[..., edge].any(axis=-1).mean() < 0.02


@pytest.mark.parametrize("objects", [2, 3, 4])
def test_objects_hardly_hide_each_other(objects):
  shapes = np.full((300, objects), scenes.SHAPES.index("square"))
  _, masks = scenes.render(shapes, 0 * shapes, 0 * shapes, seed=2, style="web")
  # The last object is drawn over the others, so all of it shows; the first may be drawn over.
  area = masks.sum(axis=(2, 3))
  assert area[:, 0].mean() > 0.98 * area[:, -1].mean()
  assert (area[:, 0] > 0.6 * area[:, -1].mean()).all()


def test_pixels_show_the_colour_under_the_mask():
  shapes = np.repeat(np.arange(6), 6)[:, None]
  colours = np.tile(np.arange(6), 6)[:, None]
  images, masks = scenes.render(shapes, colours, np.zeros_like(shapes), seed=3, style="web")
  for image, mask, colour in zip(images, masks[:, 0], colours[:, 0]):
    median = np.median(image[mask], axis=0)
    assert np.abs(scenes._RGB - median).max(axis=1).argmin() == colour


def test_textures_alternate_with_a_light_tint():
  n = 60
  shapes, colours = np.full((n, 1), scenes.SHAPES.index("square")), np.zeros((n, 1), int)
  light = []
  for texture in range(3):
    images, masks = scenes.render(shapes, colours, np.full((n, 1), texture), seed=4, style="target")
    light.append(np.mean([(image[mask][:, 1] > 110).mean() for image, mask in zip(images, masks[:, 0])]))
  assert light[0] < 0.02 and 0.2 < light[1] < 0.6 and 0.2 < light[2] < 0.6


def test_styles_differ_and_sizes_agree():
  shapes, colours, textures = _random(200, 1)
  target, masks = scenes.render(shapes, colours, textures, seed=0, style="target")
  web, _ = scenes.render(shapes, colours, textures, seed=0, style="web")
  outside = ~masks[:, 0]
  assert target[outside].mean() > 200 > 120 > web[outside].mean()
  large, large_masks = scenes.render(shapes, colours, textures, seed=0, style="target", size=64)
  assert large.shape == (200, 64, 64, 3)
  pooled = large.reshape(200, 32, 2, 32, 2, 3).astype(np.float32).mean(axis=(2, 4))
  assert np.abs(pooled - target).mean() < 6
  assert abs(large_masks.mean() - masks.mean()) < 0.01


@pytest.mark.parametrize("change, message", [
  (dict(style="photo"), "target, web"),
  (dict(shapes_no=np.array([[6]])), "shapes holds 6"),
  (dict(colours_no=np.array([[-1]])), "colours holds -1"),
  (dict(textures_no=np.array([0])), "equal"),
])
def test_bad_input_is_named(change, message):
  arguments = dict(shapes_no=np.array([[0]]), colours_no=np.array([[0]]), textures_no=np.array([[0]]),
                   seed=0, style="web") | change
  with pytest.raises(ValueError, match=message):
    scenes.render(**arguments)


def test_captions_mix_up_pairs_and_nothing_else():
  n, mixup = 6000, 0.3
  images, captions, attributes = scenes.web_corpus(n, seed=1, size=8, mixup=mixup)
  assert images.shape == (n, 8, 8, 3) and attributes.shape == (n, 3)
  assert len(set(scenes.class_number(*attributes.T).tolist())) == 108
  wrong, slots = collections.Counter(), collections.Counter()
  for caption, (texture, colour, shape) in zip(captions, attributes):
    assert set(caption.split()) <= set(scenes.WORDS)
    start, slot, said_texture, said_colour, said_shape = caption.rsplit(" ", 4)
    assert start == "a photo of"
    assert scenes.COLOURS.index(said_colour) // 2 == colour // 2
    assert scenes.SHAPES.index(said_shape) // 2 == shape // 2
    wrong.update(colour=scenes.COLOURS[colour] != said_colour, shape=scenes.SHAPES[shape] != said_shape,
                 texture=scenes.TEXTURES[texture] != said_texture)
    if slot in scenes.COLOUR_ADJECTIVES:
      assert scenes.COLOUR_ADJECTIVES[colour] == slot
    if slot in scenes.SHAPE_ADJECTIVES:
      assert scenes.SHAPE_ADJECTIVES[shape] == slot
    slots[next((kind for kind in ("COLOUR_ADJECTIVES", "SHAPE_ADJECTIVES", "SIZES")
                if slot in getattr(scenes, kind)), slot)] += 1
  assert abs(wrong["colour"] / n - mixup) < 0.02 and abs(wrong["shape"] / n - mixup) < 0.02
  assert abs(wrong["texture"] / n - 0.05 * 2 / 3) < 0.01
  for slot, share in (("a", 0.5), ("COLOUR_ADJECTIVES", 0.2), ("SHAPE_ADJECTIVES", 0.2), ("SIZES", 0.1)):
    assert abs(slots[slot] / n - share) < 0.025


def test_size_words_are_true():
  images, captions, attributes = scenes.web_corpus(3000, seed=2, size=32)
  _, masks = scenes.render(*(attributes[:, a, None] for a in (2, 1, 0)), seed=(2, 2), style="web")
  area = collections.defaultdict(list)
  for caption, (_, _, shape), mask in zip(captions, attributes, masks[:, 0]):
    word = caption.split()[3]
    if word in scenes.SIZES:
      area[word, shape].append(mask.sum())
  for shape in range(6):
    assert max(area["small", shape]) < min(area["large", shape])


def test_a_caption_names_one_of_several_objects():
  images, captions, attributes = scenes.web_corpus(120, seed=0, size=16, mixup=0, objects=3)
  alone, _, _ = scenes.web_corpus(120, seed=0, size=16, mixup=0)
  assert attributes.shape == (120, 3) and (images != alone).any()
  for caption, (_, _, shape) in zip(captions, attributes):
    assert " and " not in caption and caption.split()[-1] == scenes.SHAPES[shape]


def test_corpus_arguments_are_checked():
  with pytest.raises(ValueError, match="objects is 5"):
    scenes.web_corpus(1, 0, objects=5)
  with pytest.raises(ValueError, match="mixup is 2"):
    scenes.web_corpus(1, 0, mixup=2)


def test_pictures_of_the_corpus_in_target_style():
  web, half, target = (scenes.web_corpus(40, 0, target_share=share)[0] for share in (0, 0.5, 1))
  in_target_n = (half == target).all((1, 2, 3))
  assert 10 < in_target_n.sum() < 30
  np.testing.assert_array_equal(half, np.where(in_target_n[:, None, None, None], target, web))


@pytest.mark.parametrize("world", range(9))
def test_every_attribute_occurs_equally_often_in_every_list(world):
  lists = scenes.class_lists(world)
  assert {k: len(v) for k, v in lists.items()} == {"seen": 36, "unseen": 12, "validation": 12}
  assert set(lists["validation"]) < set(lists["seen"]) and not set(lists["unseen"]) & set(lists["seen"])
  for classes in lists.values():
    for attribute in scenes.attributes(np.array(classes)):
      assert len(set(collections.Counter(attribute.tolist()).values())) == 1
  # An unseen group is one texture, one colour pair, one shape pair: what the captions confuse is tested.
  for c, s, t in scenes.groups(world)["unseen"]:
    for colour in (2 * c, 2 * c + 1):
      for shape in (2 * s, 2 * s + 1):
        assert int(scenes.class_number(t, colour, shape)) in lists["unseen"]


def test_worlds_differ():
  assert len({scenes.class_lists(world)["unseen"] for world in range(9)}) == 9
  with pytest.raises(ValueError, match="world is 9"):
    scenes.class_lists(9)


def test_load_draws_different_pictures_for_training_and_test():
  data = scenes.load(world=1, train_per_class=3, test_per_class=2, size=16)
  assert len(data.train.labels_n) == 108 and len(data.test_unseen.labels_n) == 24
  assert data.seen == scenes.class_lists(1)["seen"]
  assert not np.array_equal(data.train.images_nhwc[0], data.test_seen.images_nhwc[0])
  again = scenes.load(world=1, train_per_class=3, test_per_class=2, size=16)
  np.testing.assert_array_equal(data.train.images_nhwc, again.train.images_nhwc)


def test_class_numbers_of_many_pictures():
  classes_no = np.random.default_rng(0).permutation(np.arange(20_000) % len(scenes.NAMES)).reshape(-1, 1)
  np.testing.assert_array_equal(scenes.class_number(*scenes.attributes(classes_no)), classes_no)
