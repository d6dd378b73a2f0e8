"""CLS-SEG against the plain derivation of plain_cls_seg.py, stage by stage, on random models and pictures."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax.models import clip_patches, cls_seg
from tests import plain_cls_seg as plain
from tests.test_tagclip import (
  BASE,
  CLASSES,
  COLUMNS,
  LABELS,
  PIXELS,
  ROWS,
  SMALL,
  make_model,
  make_texts,
  padded,
  picture,
  plain_model,
  positions_of,
)

LAYERS = dict(first_layer=1, last_layer=3)
THRESHOLD = 0.4
BOTH = pytest.mark.parametrize("compat", [False, True])
# Labels said of each picture, several, one or all; the classes after the labels are background.
SAID = [[0, 3], [2], [1, 4, 5], list(range(LABELS))]
NOTHING = {(3, 3)}  # no patch speaks for these
PAIRS = [(b, label) for b, labels in enumerate(SAID) for label in labels]


def sharp_model(config, scale, factor=4):
  """Attends as trained models do, to few; else what is spread is level, and its range no more than rounding."""
  model = make_model(config, scale)
  for layer in model.vision_model.encoder.layers:
    layer.self_attn.q_proj.kernel[...] *= factor
  return model


def exact_model(model, config):
  """`plain_model` in float64."""
  twin = plain_model(model, config)
  twin.tensors = {name: tensor.astype(np.float64) for name, tensor in twin.tensors.items()}
  return twin


@functools.cache
def compiled(graphdef, rows, columns, layers):
  def run(state, images_bijc, grids_b2, text_kp, allowed_bk, picture_n, label_n):
    model = nnx.merge(graphdef, state)
    hidden, attention = clip_patches.features(model, images_bijc, grids_b2)
    grids_n2 = grids_b2[picture_n]
    cams = cls_seg.cams(model, hidden[picture_n], grids_n2, rows, columns, text_kp, allowed_bk[picture_n])(label_n)
    affinity = cls_seg.affinity(attention, grids_b2, rows, columns, **dict(layers))
    refined = {compat: cls_seg.refine(cams, affinity[picture_n], grids_n2, threshold=THRESHOLD, compat=compat)
               for compat in (False, True)}
    return dict(hidden=hidden, attention=attention, cams=cams, affinity=affinity, refined=refined)
  return jax.jit(run)


def run_all(model, images, rows, columns, text_kp, said, **layers):
  """Everything that the stages put out, as numpy, of pictures padded to `rows` and `columns`."""
  graphdef, state = nnx.split(model)
  grids = np.array([(image.shape[0] // 16, image.shape[1] // 16) for image in images])
  allowed = np.array([[k in labels or k >= LABELS for k in range(CLASSES)] for labels in said])
  picture_n, label_n = np.array([(b, label) for b, labels in enumerate(said) for label in labels]).T
  run = compiled(graphdef, rows, columns, tuple(layers.items()))
  out = run(state, padded(images, rows, columns), grids, text_kp, allowed, picture_n, label_n)
  return types.SimpleNamespace(images=images, grids=grids, allowed=allowed, **jax.tree.map(np.asarray, out))


@pytest.fixture(scope="module")
def small():
  """Model, its plain twin, texts, and all stages of one padded batch."""
  model = sharp_model(SMALL, 20)
  images = [picture(*pixels, seed) for seed, pixels in enumerate(PIXELS)]
  text_kp = make_texts(24)
  return types.SimpleNamespace(model=model, plain=exact_model(model, SMALL), text_kp=text_kp,
                               **vars(run_all(model, images, ROWS, COLUMNS, text_kp, SAID, **LAYERS)))


def patches_of(out, b, columns=COLUMNS):
  rows, own_columns = out.grids[b]
  return (np.arange(rows)[:, None] * columns + np.arange(own_columns)).reshape(-1)


def own(out, b, maps_nij, columns=COLUMNS):
  """A picture's own patches, row by row."""
  return maps_nij.reshape(len(maps_nij), -1)[:, patches_of(out, b, columns)]


def hidden_of(out, b):
  return out.hidden[b][np.append(0, patches_of(out, b) + 1)]


def allowed_of(out, b):
  return np.nonzero(out.allowed[b])[0]


def close(found, wanted, bound=1e-5):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


PICTURES = pytest.mark.parametrize("b", range(len(PIXELS)))
EACH = pytest.mark.parametrize("n", range(len(PAIRS)))


def test_plain_gradient_is_that_of_small_differences(small):
  last = plain.LastLayer(small.plain, hidden_of(small, 2), small.text_kp, allowed_of(small, 2))
  activations = last.activations()
  last.forward(activations)
  found, rng = last.backward(4), np.random.default_rng(0)
  which = np.nonzero(last.allowed_k == 4)[0][0]
  for _ in range(20):
    step = np.zeros_like(activations)
    step[tuple(rng.integers(step.shape))] = 1e-5
    difference = last.forward(activations + step)[which] - last.forward(activations - step)[which]
    close((found * step).sum(), difference / 2, 1e-6 * np.abs(found).max() * 1e-5)


@PICTURES
def test_features(small, b):
  hidden, attention = plain.features(small.plain, small.images[b], positions_of(small.model, *small.grids[b]))
  close(hidden_of(small, b), hidden)
  patches = patches_of(small, b)
  for found, wanted in zip(small.attention, attention, strict=True):
    close(found[b][patches][:, patches], wanted)


@EACH
def test_cams(small, n):
  b, label = PAIRS[n]
  wanted = plain.cam(small.plain, hidden_of(small, b), small.text_kp, allowed_of(small, b), label)
  assert wanted.std() > 0.05 or PAIRS[n] in NOTHING and not wanted.any()
  close(own(small, b, small.cams)[n], wanted)
  assert not small.cams[n].sum() - own(small, b, small.cams)[n].sum() > 1e-4  # the padding is 0


@PICTURES
def test_affinity(small, b):
  patches = patches_of(small, b)
  attention = [weights[b][patches][:, patches] for weights in small.attention]
  found = small.affinity[b][patches][:, patches]
  close(found, plain.affinity(attention, **LAYERS))
  close(found, found.T, 1e-7)
  close(small.affinity[b].sum(), found.sum(), 1e-4)


@BOTH
@EACH
def test_refine(small, n, compat):
  b, _ = PAIRS[n]
  patches = patches_of(small, b)
  wanted = plain.refine(own(small, b, small.cams)[n], small.affinity[b][patches][:, patches], *small.grids[b],
                        THRESHOLD, compat)
  close(own(small, b, small.refined[compat])[n], wanted)


def from_picture(model, positions, image, text_kp, allowed_k, label, threshold, compat, **layers):
  hidden, attention = plain.features(model, image, positions)
  found = plain.cam(model, hidden, text_kp, allowed_k, label)
  rows, columns = (side // 16 for side in image.shape[:2])
  return plain.refine(found, plain.affinity(attention, **layers), rows, columns, threshold, compat)


@BOTH
@EACH
def test_from_picture_to_map(small, n, compat):
  b, label = PAIRS[n]
  wanted = from_picture(small.plain, positions_of(small.model, *small.grids[b]), small.images[b], small.text_kp,
                        allowed_of(small, b), label, THRESHOLD, compat, **LAYERS)
  close(own(small, b, small.refined[compat])[n], wanted)


@pytest.mark.parametrize("b", [1, 3])
def test_padding_and_other_pictures_change_nothing(small, b):
  rows, columns = map(int, small.grids[b])
  alone = run_all(small.model, small.images[b:b + 1], rows, columns, small.text_kp, SAID[b:b + 1], **LAYERS)
  chosen = [n for n, (picture_n, _) in enumerate(PAIRS) if picture_n == b]
  close(own(alone, 0, alone.cams, columns), own(small, b, small.cams)[chosen])
  for compat in (False, True):
    close(own(alone, 0, alone.refined[compat], columns), own(small, b, small.refined[compat])[chosen])


def test_vit_base():
  model, text_kp, image = sharp_model(BASE, 100), make_texts(512), picture(43, 90, 5)
  layers = dict(first_layer=0, last_layer=2)
  out, twin = run_all(model, [image], 4, 7, text_kp, [[0, 4]], **layers), exact_model(model, BASE)
  positions = positions_of(model, *out.grids[0])
  for n, label in enumerate((0, 4)):
    for compat in (False, True):
      wanted = from_picture(twin, positions, image, text_kp, allowed_of(out, 0), label, THRESHOLD, compat, **layers)
      close(own(out, 0, out.refined[compat], 7)[n], wanted)


def test_a_label_beyond_doubt_still_has_a_map(small):
  """Its probability is 1 in float32, and its gradient would be nothing, or noise."""
  b, label, scale = 1, 2, 25
  text_kp = small.text_kp.copy()
  last = plain.LastLayer(small.plain, hidden_of(small, b), text_kp, allowed_of(small, b))
  last.forward(last.activations())
  text_kp[label] += 2 * last.unit_p
  text_kp[label] /= np.linalg.norm(text_kp[label])
  model = sharp_model(SMALL, scale)
  twin = exact_model(model, SMALL)
  last = plain.LastLayer(twin, hidden_of(small, b), text_kp, allowed_of(small, b))
  rest = 1 - last.forward(last.activations()).max()
  assert 1e-12 < rest < 1e-8
  allowed = jnp.asarray(small.allowed[b:b + 1])
  inputs = small.hidden[b:b + 1], small.grids[b:b + 1], ROWS, COLUMNS, text_kp, allowed
  maps = jax.jit(lambda model, label_b: cls_seg.cams(model, *inputs)(label_b))
  found = maps(model, np.array([label]))
  wanted = plain.cam(twin, hidden_of(small, b), text_kp, allowed_of(small, b), label)
  assert wanted.max() == 1
  close(own(small, b, np.asarray(found))[0], wanted)


def flat(patches):
  return np.full((1, patches, patches), 1 / patches, np.float32)


def refined(cam_ij, affinity_blm=None, **settings):
  rows, columns = cam_ij.shape
  affinity_blm = np.eye(rows * columns, dtype=np.float32)[None] if affinity_blm is None else affinity_blm
  return np.asarray(cls_seg.refine(cam_ij[None].astype(np.float32), affinity_blm, np.array([[rows, columns]]),
                                   **settings))[0]


def test_compat_differs_only_at_edges():
  cam = np.zeros((5, 6))
  cam[1, 2], cam[2, 3], cam[3, 0], cam[1, 3] = 1, 0.5, 0.45, 0.2  # a box from two corners, and one of a patch
  for compat in (False, True):
    found = refined(cam, threshold=0.4, compat=compat)
    close(found, np.where(cam > 0, cam, 0), 1e-7)
    close(refined(cam, threshold=0.7, compat=compat), cam == 1, 0)
  cam[4, 5] = 0.9
  assert refined(cam, threshold=0.4)[4, 5] > 0.8 and refined(cam, threshold=0.4, compat=True)[4, 5] == 0


@pytest.mark.parametrize(("threshold", "byte"), [(0.4, 101), (0.7, 177)])
def test_threshold_is_of_bytes(threshold, byte):
  cam = np.zeros((3, 4))
  cam[0, 0], cam[1, 2], cam[2, 0] = 1, (byte + 1.01) / 255, (byte + 0.99) / 255
  found = refined(cam, threshold=threshold)
  assert found[1, 2] > 0 and found[2, 0] == 0


def test_level_maps_and_single_patches_are_empty():
  assert not refined(np.zeros((4, 5)), threshold=0.4).any()
  assert not refined(np.ones((1, 1)), threshold=0.4).any()
  assert not refined(np.eye(3), flat(9), threshold=0.4).any()  # all patches get the same
  nothing = np.asarray(cls_seg.affinity([np.zeros((1, 4, 4), np.float32)], np.array([[2, 2]]), 2, 2, first_layer=0,
                                        last_layer=0))
  assert not nothing.any()


def test_affinity_of_doubly_stochastic_weights_is_symmetric():
  shift = np.roll(np.eye(6), 1, axis=1).astype(np.float32)[None]
  found = cls_seg.affinity([shift * 3], np.array([[2, 3]]), 2, 3, first_layer=0, last_layer=0)
  close(found[0], (shift[0] + shift[0].T) / 2, 1e-7)
  cam = np.zeros((2, 3))
  cam[0, 2] = 1
  close(refined(cam, found, threshold=0.4), [[0.5, 0, 1], [0, 0.5, 0]], 1e-6)  # of its square


def test_errors(small):
  for first, last in ((2, 1), (0, 5), (-1, 2)):
    with pytest.raises(ValueError, match=f"first_layer {first} and last_layer {last} do not fit a model of 5 layers"):
      cls_seg.affinity(small.attention, small.grids, ROWS, COLUMNS, first_layer=first, last_layer=last)
