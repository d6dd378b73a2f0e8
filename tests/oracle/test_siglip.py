"""SigLIP's towers against transformers on perturbed random weights, through real folders."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import hub, siglip
from tests.oracle.parity import close, perturbed, to_torch

TEXT = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=11, bos_token_id=58, eos_token_id=59, pad_token_id=59,
            model_type="siglip_text_model")
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24,
              patch_size=8, model_type="siglip_vision_model")
BOTH = {"model_type": "siglip", "text_config": TEXT, "vision_config": VISION}
IDS = np.array([[3, 17, 59, 59, 59, 59, 59, 59, 59, 59, 59], [9, 59, 4, 59, 0, 0, 0, 0, 0, 0, 0]])
IMAGES = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


def _both(**changes):
  return perturbed(transformers.SiglipModel(transformers.SiglipConfig(
      text_config=TEXT | changes, vision_config=VISION, attn_implementation="eager")))


@pytest.mark.parametrize("act, size", [("gelu_pytorch_tanh", None), ("gelu", 20)])
def test_text_tower(tmp_path, act, size):
  theirs = _both(hidden_act=act, projection_size=size)
  theirs.save_pretrained(tmp_path)
  with torch.no_grad():
    wanted = theirs.text_model(torch.from_numpy(IDS), output_hidden_states=True, output_attentions=True)
  embeds_bp, out = hub.load(siglip.SiglipModel, tmp_path).text_model(IDS)
  close(embeds_bp, wanted.pooler_output)
  close(out["last"], wanted.last_hidden_state)
  for ours, layer in zip(out["attention"], wanted.attentions, strict=True):
    close(ours, layer)
  for ours, layer in zip(out["hidden"][:-1], wanted.hidden_states[:-1], strict=True):
    close(ours, layer)


@pytest.mark.parametrize("alone", [False, True])
def test_vision_tower(tmp_path, alone):
  both = _both()
  theirs = both.vision_model
  (theirs if alone else both).save_pretrained(tmp_path)
  with torch.no_grad():
    wanted = theirs(to_torch(IMAGES), output_hidden_states=True, output_attentions=True)
  pooled_bd, out = hub.load(siglip.SiglipVisionModel, tmp_path)(IMAGES)
  close(pooled_bd, wanted.pooler_output)
  close(out["patches"], wanted.last_hidden_state)
  for ours, layer in zip(out["attention"], wanted.attentions, strict=True):
    close(ours, layer)
  for ours, layer in zip(out["hidden"][:-1], wanted.hidden_states[:-1], strict=True):
    close(ours, layer)


def test_logits_of_both_towers(tmp_path):
  theirs = _both()
  theirs.save_pretrained(tmp_path)
  wanted = theirs(torch.from_numpy(IDS), to_torch(IMAGES))
  model = hub.load(siglip.SiglipModel, tmp_path)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  cosines = unit(model.vision_model(IMAGES)[0]) @ unit(model.text_model(IDS)[0]).T
  close(jnp.exp(model.logit_scale[...]) * cosines + model.logit_bias[...], wanted.logits_per_image)


def test_gradient_with_respect_toto_torch(tmp_path):
  theirs = _both()
  theirs.save_pretrained(tmp_path)
  model = hub.load(siglip.SiglipVisionModel, tmp_path)
  weights = np.random.default_rng(3).normal(size=(2, 32)).astype(np.float32)
  pixels = to_torch(IMAGES).requires_grad_()
  (theirs.vision_model(pixels).pooler_output * torch.from_numpy(weights)).sum().backward()
  wanted = pixels.grad.permute(0, 2, 3, 1).numpy()
  ours = jax.grad(lambda images_bijc: (model(images_bijc)[0] * weights).sum())(jnp.asarray(IMAGES))
  assert np.abs(wanted).max() > 0.01
  assert np.abs(np.asarray(ours) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("ours, theirs, config", [
    (siglip.SiglipModel, transformers.SiglipModel, BOTH),
    (siglip.SiglipVisionModel, transformers.SiglipVisionModel, VISION)], ids=["both", "vision"])
def test_transformers_opens_what_save_writes(tmp_path, ours, theirs, config):
  model = ours.from_json(config, rngs=nnx.Rngs(4))
  hub.save(model, tmp_path, config, dtype=np.float32)
  opened, report = theirs.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  vision, wanted = (model, opened) if config is VISION else (model.vision_model, opened.vision_model)
  close(vision(IMAGES)[0], wanted(to_torch(IMAGES)).pooler_output)


def test_bfloat16_computes_in_bfloat16():
  model = siglip.SiglipVisionModel.from_json(VISION, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert model(IMAGES)[0].dtype == jnp.bfloat16


def test_images_of_another_size_are_refused():
  model = siglip.SiglipVisionModel.from_json(VISION, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="32x24 pixels .* image_size 24"):
    model(np.zeros((1, 32, 24, 3), np.float32))
