"""DINOv2 against transformers on perturbed random weights, through real folders."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp
import safetensors.torch
from flax import nnx

from digzsl_jax.models import dinov2, hub
from tests.oracle.parity import close, perturbed, to_torch

CONFIG = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4)
SIZES = [(20, 20), (8, 8), (16, 9), (28, 24), (4, 100)]  # as trained, and to fewer and more positions


def _perturbed(model_type, **changes):
  return perturbed(model_type(transformers.Dinov2Config(**CONFIG, attn_implementation="eager", **changes)))


def _images(i, j):
  return np.random.default_rng(0).normal(size=(2, i, j, 3)).astype(np.float32)


@pytest.mark.parametrize("size, new", [(37, 16), (37, 37), (16, 37), (37, 50), (5, 1), (1, 4), (37, 40)])
def test_bicubic_weights(size, new):
  identity = torch.eye(size)[None, None]
  wanted = torch.nn.functional.interpolate(identity, (new, size), mode="bicubic", align_corners=False)[0, 0]
  np.testing.assert_allclose(dinov2.bicubic(size, new), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("i, j", SIZES)
def test_feature_of_every_size(tmp_path, i, j):
  theirs = _perturbed(transformers.Dinov2Model)
  theirs.save_pretrained(tmp_path)
  assert "embeddings.mask_token" in safetensors.torch.load_file(tmp_path / "model.safetensors")
  with torch.no_grad():
    wanted = theirs(to_torch(_images(i, j)), output_hidden_states=True, output_attentions=True)
  feature_bd, out = hub.load(dinov2.Dinov2Model, tmp_path)(_images(i, j))
  close(feature_bd, wanted.pooler_output)
  close(out["patches"], wanted.last_hidden_state[:, 1:])
  for name, reference in (("hidden", wanted.hidden_states), ("attention", wanted.attentions)):
    for ours, layer in zip(out[name], reference, strict=True):
      close(ours, layer)


@pytest.mark.parametrize("changes", [{"use_swiglu_ffn": True}, {"mlp_ratio": 2, "qkv_bias": False}])
def test_feed_forward_of_every_kind(tmp_path, changes):
  theirs = _perturbed(transformers.Dinov2Model, **changes)
  theirs.save_pretrained(tmp_path)
  feature_bd, _ = hub.load(dinov2.Dinov2Model, tmp_path)(_images(8, 8))
  close(feature_bd, theirs(to_torch(_images(8, 8))).pooler_output)


def test_classifier_is_left_out(tmp_path):
  theirs = _perturbed(transformers.Dinov2ForImageClassification, num_labels=5)
  theirs.save_pretrained(tmp_path)
  feature_bd, _ = hub.load(dinov2.Dinov2Model, tmp_path)(_images(8, 8))
  close(feature_bd, theirs.dinov2(to_torch(_images(8, 8))).pooler_output)


@pytest.mark.parametrize("i, j", [(20, 20), (8, 12)])
def test_gradient_with_respect_toto_torch(tmp_path, i, j):
  theirs = _perturbed(transformers.Dinov2Model)
  theirs.save_pretrained(tmp_path)
  model = hub.load(dinov2.Dinov2Model, tmp_path)
  weights = np.random.default_rng(3).normal(size=(2, 32)).astype(np.float32)
  pixels = to_torch(_images(i, j)).requires_grad_()
  (theirs(pixels).pooler_output * torch.from_numpy(weights)).sum().backward()
  wanted = pixels.grad.permute(0, 2, 3, 1).numpy()
  ours = jax.grad(lambda images_bijc: (model(images_bijc)[0] * weights).sum())(jnp.asarray(_images(i, j)))
  assert np.abs(wanted).max() > 0.01
  assert np.abs(np.asarray(ours) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_opens_what_save_writes(tmp_path, swiglu):
  config = CONFIG | {"model_type": "dinov2", "use_swiglu_ffn": swiglu, "use_mask_token": False}
  model = dinov2.Dinov2Model.from_json(config, rngs=nnx.Rngs(2))
  hub.save(model, tmp_path, config, dtype=np.float32)
  opened, report = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  close(model(_images(8, 8))[0], opened(to_torch(_images(8, 8))).pooler_output)


def test_bfloat16_computes_in_bfloat16():
  model = dinov2.Dinov2Model.from_json(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert model(_images(8, 8))[0].dtype == jnp.bfloat16


def test_images_smaller_than_a_patch_are_refused():
  model = dinov2.Dinov2Model.from_json(CONFIG, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="smaller than a patch of 4x4"):
    model(_images(3, 8))
