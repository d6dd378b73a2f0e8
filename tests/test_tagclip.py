"""TagCLIP against the plain derivation of plain_tagclip.py, stage by stage, on random models and pictures."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from digzsl_jax.models import clip, clip_patches, hub, tagclip
from tests import plain_tagclip as plain

TEXT = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=4, eos_token_id=7)
SMALL = {"text_config": TEXT, "projection_dim": 24, "vision_config": dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, image_size=64, patch_size=16)}
# As ViT-B/16 but for the number of layers.
BASE = {"text_config": TEXT, "projection_dim": 512, "vision_config": dict(num_hidden_layers=3, patch_size=16)}
CLASSES, LABELS = 9, 6
PIXELS = [(64, 64), (96, 160), (149, 77), (20, 380)]  # the model's own size, any, no whole patches, elongated
ROWS, COLUMNS = 10, 24  # of the batch
SETTINGS = dict(first_layer=1, votes=3)
THRESHOLD = 0.3
BOTH = pytest.mark.parametrize("compat", [False, True])


def make_model(config, scale):
  """With random weights whose scores differ from patch to patch."""
  graphdef, state = nnx.split(hub.abstract(clip.CLIPModel, config))
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    if "logit_scale" in name:
      return jnp.log(jnp.float32(scale))
    wide = 0.3 if len(leaf.shape) < 2 or "position" in name else np.prod(leaf.shape[:-1])**-0.5
    return jnp.asarray(rng.normal("scale" in name, wide, leaf.shape), jnp.float32)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def plain_model(model, config):
  tensors = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
  vision = clip.VisionConfig.from_json(config["vision_config"])
  return plain.Clip(tensors, vision.num_attention_heads, vision.num_hidden_layers, vision.image_size // 16)


def make_texts(width):
  text_kp = np.random.default_rng(1).normal(size=(CLASSES, width)).astype(np.float32)
  return text_kp / np.linalg.norm(text_kp, axis=1, keepdims=True)


def picture(height, width, seed):
  """Spots on a ground, made as large as whole patches are."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
  rows, columns = tagclip.grid(height, width, 16)
  image = PIL.Image.fromarray(image).resize((width, height)).resize((16 * columns, 16 * rows), PIL.Image.BICUBIC)
  return np.asarray(image, np.float32) / 64 - 2


@functools.cache
def compiled(graphdef, **settings):
  """All stages up to the second look, published and corrected."""
  def run(state, images_bijc, grids_b2, text_kp):
    model = nnx.merge(graphdef, state)
    coarse, attention = tagclip.coarse_scores(model, images_bijc, grids_b2, text_kp)
    refined = {c: tagclip.refine(coarse, attention, grids_b2, compat=c, **settings) for c in (False, True)}
    proposals = {c: tagclip.propose(refined[c], grids_b2, LABELS, threshold=THRESHOLD, compat=c) for c in refined}
    return coarse, attention, refined, proposals
  return jax.jit(run)


@functools.cache
def compiled_look(graphdef):
  return jax.jit(lambda state, *inputs: tagclip.reidentify(nnx.merge(graphdef, state), *inputs))


def padded(images, rows, columns):
  batch = np.full((len(images), 16 * rows, 16 * columns, 3), 7, np.float32)
  for row, image in zip(batch, images):
    row[:image.shape[0], :image.shape[1]] = image
  return batch


def run_all(model, images, rows, columns, text_kp, **settings):
  """Everything that the stages put out, as numpy, of pictures padded to `rows` and `columns`."""
  graphdef, state = nnx.split(model)
  grids = np.array([(image.shape[0] // 16, image.shape[1] // 16) for image in images])
  batch = padded(images, rows, columns)
  coarse, attention, refined, proposals = compiled(graphdef, **settings)(state, batch, grids, text_kp)
  looked = {}
  for compat, found in proposals.items():
    places = np.nonzero(np.asarray(found.candidates_bf))
    filled = [np.resize(place, len(images) * LABELS) for place in places]  # one shape for all
    probabilities = compiled_look(graphdef)(state, batch, found, *filled, text_kp)
    looked[compat] = dict(zip(zip(*map(np.ndarray.tolist, places)), np.asarray(probabilities).tolist()))
  return types.SimpleNamespace(images=images, grids=grids, **jax.tree.map(np.asarray, dict(
      coarse=coarse, attention=attention, refined=refined, proposals=proposals)), looked=looked)


@pytest.fixture(scope="module")
def small():
  """Model, its plain twin, texts, and all stages of one padded batch."""
  model = make_model(SMALL, 20)
  images = [picture(*pixels, seed) for seed, pixels in enumerate(PIXELS)]
  text_kp = make_texts(24)
  return types.SimpleNamespace(model=model, plain=plain_model(model, SMALL), text_kp=text_kp,
                               **vars(run_all(model, images, ROWS, COLUMNS, text_kp, **SETTINGS)))


def part(out, b):
  """A picture's own patches of `[b, i, j, k]`, row by row."""
  rows, columns = out.grids[b]
  return lambda scores: scores[b, :rows, :columns].reshape(rows * columns, -1)


def patches_of(out, b):
  rows, columns = out.grids[b]
  return (np.arange(rows)[:, None] * out.coarse.shape[2] + np.arange(columns)).reshape(-1)


def attention_of(out, b):
  own = patches_of(out, b)
  return [weights[b][own][:, own] for weights in out.attention]


def positions_of(model, rows, columns):
  grids = np.array([[rows, columns]])
  return np.asarray(clip_patches.positions(model.vision_model.embeddings, grids, rows, columns))[0]


def close(found, wanted, bound=1e-5):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


PICTURES = pytest.mark.parametrize("b", range(len(PIXELS)))


def test_positions_are_bilinear_in_half_precision(small):
  own = small.plain.own_positions()
  np.testing.assert_array_equal(positions_of(small.model, 4, 4), own)
  for rows, columns in ((6, 10), (3, 4), (2, 24)):
    found, wanted = positions_of(small.model, rows, columns), small.plain.positions(rows, columns)
    np.testing.assert_array_equal(found[0], own[0])
    np.testing.assert_array_equal(found[1:], found[1:].astype(np.float16))
    # A value in the middle between two of half precision may go either way; none goes further.
    halfway = np.spacing(np.abs(wanted[1:]).astype(np.float16)).astype(float) / 2
    assert (np.abs(found[1:] - wanted[1:]) <= halfway * 1.01 + 1e-7).all()


def test_half_is_ieee():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=4000) * 10.0**rng.integers(-9, 3, 4000)).astype(np.float32)
  np.testing.assert_array_equal(jax.jit(clip_patches._half)(x), x.astype(np.float16).astype(np.float32))


@PICTURES
def test_coarse_scores(small, b):
  positions = positions_of(small.model, *small.grids[b])
  scores, attention = plain.coarse_scores(small.plain, small.images[b], positions, small.text_kp)
  assert scores.std(0).max() > 0.05  # patches differ
  close(part(small, b)(small.coarse), scores)
  for found, wanted in zip(attention_of(small, b), attention, strict=True):
    close(found, wanted)


@BOTH
@PICTURES
def test_refine(small, b, compat):
  own = part(small, b)
  wanted = plain.refine(own(small.coarse), attention_of(small, b), *small.grids[b], compat=compat, **SETTINGS)
  close(own(small.refined[compat]), wanted)
  padding = small.refined[compat][b].sum() - own(small.refined[compat]).sum()
  close(padding, 0)


@BOTH
@PICTURES
def test_propose(small, b, compat):
  refined, found = part(small, b)(small.refined[compat]), small.proposals[compat]
  wanted = plain.candidates(refined, *small.grids[b], LABELS, THRESHOLD, compat)
  close(found.scores_bf[b], plain.image_scores(refined, LABELS), 0)
  assert set(np.nonzero(found.candidates_bf[b])[0]) == set(wanted)
  for label, (mask, box) in wanted.items():
    np.testing.assert_array_equal(part(small, b)(found.masks_bijf)[:, label], mask.reshape(-1))
    assert tuple(found.boxes_bf4[b, label]) == box


@BOTH
def test_reidentify(small, compat):
  assert len(small.looked[compat]) >= 6
  for (b, label), probability in small.looked[compat].items():
    (mask, box) = plain.candidates(part(small, b)(small.refined[compat]), *small.grids[b], LABELS, THRESHOLD,
                                   compat)[label]
    close(probability, plain.reidentify(small.plain, small.images[b], mask, box, label, small.text_kp))


def test_reidentify_small_regions(small):
  rng = np.random.default_rng(2)
  masks = rng.random((len(PIXELS), ROWS, COLUMNS, LABELS)) < 0.4
  places = {(1, 0): (1, 2, 4, 9), (1, 3): (5, 3, 6, 4), (2, 5): (2, 0, 10, 5), (3, 1): (0, 7, 2, 22)}
  boxes = np.zeros((len(PIXELS), LABELS, 4), np.int32)
  for place, box in places.items():
    boxes[place] = box
  graphdef, state = nnx.split(small.model)
  found = small.proposals[False]._replace(masks_bijf=masks, boxes_bf4=boxes)
  filled = [np.resize(np.array(index), len(PIXELS) * LABELS) for index in zip(*places)]
  batch = padded(small.images, ROWS, COLUMNS)
  probabilities = compiled_look(graphdef)(state, batch, found, *filled, small.text_kp)
  for (b, label), probability in zip(places, probabilities):
    close(probability, plain.reidentify(small.plain, small.images[b], masks[b, ..., label], places[b, label], label,
                                        small.text_kp))


def plain_scores(model, positions, image, text_kp, compat, **settings):
  """From the picture to the final scores, by the plain derivation alone."""
  rows, columns = (side // 16 for side in image.shape[:2])
  coarse, attention = plain.coarse_scores(model, image, positions, text_kp)
  refined = plain.refine(coarse, attention, rows, columns, compat=compat, **settings)
  scores = plain.image_scores(refined, LABELS)
  for label, (mask, box) in plain.candidates(refined, rows, columns, LABELS, THRESHOLD, compat).items():
    again = plain.reidentify(model, image, mask, box, label, text_kp)
    scores[label] = (scores[label] + again) / 2
  return scores


def final_scores(out, compat):
  scores = out.proposals[compat].scores_bf.copy()
  for (b, label), probability in out.looked[compat].items():
    scores[b, label] = (scores[b, label] + probability) / 2
  return scores


@BOTH
def test_from_picture_to_tags(small, compat):
  found = final_scores(small, compat)
  said = np.asarray(tagclip.tags(found, THRESHOLD))
  for b, image in enumerate(small.images):
    is_own = tuple(small.grids[b]) == (4, 4)
    positions = small.plain.own_positions() if is_own else small.plain.positions(*small.grids[b]).astype(np.float16)
    wanted = plain_scores(small.plain, positions, image, small.text_kp, compat, **SETTINGS)
    close(found[b], wanted)
    assert set(np.nonzero(said[b])[0]) == plain.tags(wanted, THRESHOLD)


@pytest.mark.parametrize("b", [1, 3])
def test_padding_and_other_pictures_change_nothing(small, b):
  alone = run_all(small.model, small.images[b:b + 1], *small.grids[b], small.text_kp, **SETTINGS)
  close(part(alone, 0)(alone.coarse), part(small, b)(small.coarse))
  for compat in (False, True):
    close(part(alone, 0)(alone.refined[compat]), part(small, b)(small.refined[compat]))
    close(final_scores(alone, compat)[0], final_scores(small, compat)[b])
    np.testing.assert_array_equal(alone.proposals[compat].boxes_bf4[0], small.proposals[compat].boxes_bf4[b])


def test_vit_base():
  model, text_kp, image = make_model(BASE, 100), make_texts(512)[::-1], picture(43, 90, 5)
  settings = dict(first_layer=0, votes=2)
  out, twin = run_all(model, [image], 4, 6, text_kp, **settings), plain_model(model, BASE)
  positions = positions_of(model, *out.grids[0])
  coarse, _ = plain.coarse_scores(twin, image, positions, text_kp)
  close(part(out, 0)(out.coarse), coarse)
  assert out.looked[False] and out.looked[True]
  for compat in (False, True):
    close(final_scores(out, compat)[0], plain_scores(twin, positions, image, text_kp, compat, **settings))


def test_boxes_of_connected_parts():
  snail = ["#########.", "........#.", "#######.#.", "#.....#.#.", "#.###.#.#.",
           "#.#...#.#.", "#.#####.#.", "#.......#.", "#########.", ".........."]
  steps = ["#.........", ".#........", "..#.......", "...#......", ".........#",
           "#.......#.", "..........", "..###.....", "..#.#.....", "..###..#.."]
  maps = [np.array([list(row) for row in rows]) == "#" for rows in (snail, steps)]
  maps += [np.zeros((10, 10), bool), np.ones((10, 10), bool)]
  maps += list(np.random.default_rng(0).random((20, 10, 10)) < np.linspace(0.05, 0.6, 20)[:, None, None])
  found = np.asarray(jax.jit(tagclip.boxed)(np.stack(maps, axis=-1)[None]))[0]
  for k, mask in enumerate(maps):
    wanted = np.zeros_like(mask)
    for top, left, bottom, right in plain.boxes(mask):
      wanted[top:bottom, left:right] = True
    np.testing.assert_array_equal(found[..., k], wanted)
  assert found[..., 0][:9, :9].all() and not found[..., 0][9].any() and not found[..., 0][:, 9].any()


def flat_attention(patches):
  """Every patch attends to itself, and a little to all others."""
  return [(0.8 * np.eye(patches) + 0.1 / patches).astype(np.float32)[None]] * 4


def test_compat_differs_only_at_edges():
  scores = np.full((1, 5, 6, 3), 0.01, np.float32)
  scores[0, 1:3, 2:4, 0], scores[0, 3, 1, 1], scores[0, 0, 0, 2] = 0.9, 0.7, 0.8  # none in the last row or column
  grids = np.array([[5, 6]])

  def both(scores):
    refined = [tagclip.refine(scores, flat_attention(30), grids, first_layer=0, votes=2, compat=c)
               for c in (False, True)]
    return refined, [tagclip.propose(r, grids, 3, compat=c) for r, c in zip(refined, (False, True))]
  refined, proposals = both(scores)
  for mine, published in zip((refined[0], *proposals[0]), (refined[1], *proposals[1])):
    np.testing.assert_array_equal(mine, published)
  assert proposals[0].candidates_bf.all()
  scores[0, 4, 5, 1] = 0.95  # the corner
  (mine, published), _ = both(scores)
  assert mine[0, 4, 5, 1] > 0.7 and published[0, 4, 5, 1] == 0


def test_published_early_return():
  refined = np.full((1, 4, 5, 5), 0.1, np.float32)
  refined[0, 1, 1, 0], refined[0, 3, 2, 1], refined[0, 2, 2, 2] = 0.9, 0.8, 0.7  # the second in the last row
  refined[..., 3] = 0.6  # level
  refined[0, 0, 0, 4] = 0.48  # below the threshold, 0.1 + (0.9 - 0.1) / 2
  grids = np.array([[4, 5]])
  mine = tagclip.propose(refined, grids, 5)
  published = tagclip.propose(refined, grids, 5, compat=True)
  assert mine.candidates_bf.tolist() == [[True] * 4 + [False]]
  assert published.candidates_bf.tolist() == [[True] + [False] * 4]
  assert mine.boxes_bf4[0, :4].tolist() == [[1, 1, 2, 2], [3, 2, 4, 3], [2, 2, 3, 3], [0, 0, 4, 5]]
  for compat, found in ((False, mine), (True, published)):
    wanted = plain.candidates(refined.reshape(20, 5), 4, 5, 5, 0.5, compat)
    assert sorted(wanted) == np.nonzero(found.candidates_bf[0])[0].tolist()


def test_a_picture_of_one_patch():
  scores = np.array([0.7, 0.3], np.float32).reshape(1, 1, 1, 2)
  attention, grids = [np.full((1, 1, 1), 0.5, np.float32)] * 3, np.array([[1, 1]])
  # No weight is above the mean of one: nothing is spread, and the first label is said.
  refined = tagclip.refine(scores, attention, grids, first_layer=0, votes=1)
  assert not np.any(refined)
  found = tagclip.propose(refined, grids, 2)
  assert not np.any(found.candidates_bf) and np.asarray(tagclip.tags(found.scores_bf)).tolist() == [[True, False]]


def test_tags():
  scores = np.array([[0.1, 0.45, 0.9], [0.2, 0.2, 0.2], [0.0, 0.51, 1.0]], np.float32)
  assert np.asarray(tagclip.tags(scores)).tolist() == [[False, False, True], [True, False, False], [False, True, True]]
  assert np.asarray(tagclip.tags(scores, 0.1))[0].tolist() == [False, True, True]


def test_nearest_is_that_of_pytorch():
  # 62 * (1 / 14) in float32 is short of a whole place at the 7th output (torch 2.13: 30, not 31).
  table = np.asarray(tagclip._nearest(62, 14))
  assert table[62, 7] == 30 and table[28].tolist() == list(range(0, 28, 2)) and table[1].max() == 0


def test_errors(small):
  with pytest.raises(ValueError, match="images of 40x64 pixels are no whole patches of 16: resize them"):
    tagclip.coarse_scores(small.model, np.zeros((1, 40, 64, 3)), np.array([[2, 4]]), small.text_kp)
  for settings in (dict(first_layer=4, votes=3), dict(first_layer=0, votes=6)):
    with pytest.raises(ValueError, match=r"first_layer \d and votes \d do not fit a model of 5 layers"):
      tagclip.refine(small.coarse, small.attention, small.grids, **settings)
