"""Preprocessing and heads of the category discrimination model against PyTorch."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import safetensors.torch
from flax import nnx

from digzsl_jax.models import cdm

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def _preprocess(images_bijc, size, shortest=None):
  """The steps of CLIP's image processor, without Pillow's rounding to integers."""
  shortest = shortest or size
  images = (torch.as_tensor(images_bijc).permute(0, 3, 1, 2) + 1) / 2
  scaled = [shortest * side // min(images.shape[2:]) for side in images.shape[2:]]
  if min(images.shape[2:]) != shortest:
    images = torch.nn.functional.interpolate(images, scaled, mode="bicubic", antialias=True)
  top, left = (round((side - size) / 2) for side in scaled)
  images = images[..., top:top + size, left:left + size]
  mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
  return ((images - mean) / std).permute(0, 2, 3, 1)


@pytest.mark.parametrize("shape", [(31, 20), (20, 33), (16, 16), (9, 7), (16, 21)])
def test_preprocessing_and_its_gradient(tmp_path, shape):
  config = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 16}, "resample": 3}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  ours = cdm.Preprocess.from_folder(tmp_path, 16)
  rng = np.random.default_rng(0)
  images, weights = (rng.normal(size=(2, *size, 3)).astype(np.float32) for size in (shape, (16, 16)))
  theirs = torch.tensor(images, requires_grad=True)
  wanted = _preprocess(theirs, 16)
  assert np.abs(np.asarray(ours(images)) - wanted.detach().numpy()).max() <= 1e-5
  (wanted * torch.tensor(weights)).sum().backward()
  gradient = jax.grad(lambda images: jnp.sum(ours(images) * weights))(jnp.asarray(images))
  assert np.abs(np.asarray(gradient) - theirs.grad.numpy()).max() <= 1e-5 * theirs.grad.abs().max()


TOWER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
VISION = dict(TOWER, image_size=12, patch_size=4)
TEXT = dict(TOWER, vocab_size=20, bos_token_id=18, eos_token_id=19, pad_token_id=19)
ENCODERS = {  # model, `size`, `crop_size`, and the reference's feature of preprocessed pixels
    "vit": (lambda t: t.ViTModel(t.ViTConfig(**VISION)), {"height": 12, "width": 12}, None,
            lambda model, pixels: model(pixels).last_hidden_state[:, 0]),
    "dinov2": (lambda t: t.Dinov2Model(t.Dinov2Config(**VISION | {"image_size": 20})), {"shortest_edge": 15},
               {"height": 12, "width": 12}, lambda model, pixels: model(pixels).pooler_output),
    "siglip": (lambda t: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VISION)), 12, None,
               lambda model, pixels: model.vision_model(pixels).pooler_output),
    "siglip_vision_model": (lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)), 12, None,
                            lambda model, pixels: model(pixels).pooler_output),
    "clip": (lambda t: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)), 12, 12,
             lambda model, pixels: torch.cat([model.vision_model(pixels).pooler_output, torch.nn.functional.normalize(
                 model.get_image_features(pixels).pooler_output)], -1))}


@pytest.mark.parametrize("model_type", cdm.MODELS)
def test_features_of_every_encoder_and_their_gradient(tmp_path, model_type):
  make, size, crop, feature = ENCODERS[model_type]
  model = make(pytest.importorskip("transformers")).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape)
  model.save_pretrained(tmp_path)
  config = {"image_mean": MEAN, "image_std": STD, "size": size, "crop_size": crop, "do_center_crop": crop is not None}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  encoder = cdm.load_encoder(tmp_path, None, None)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 18, 25, 3)).astype(np.float32)
  theirs = torch.tensor(images, requires_grad=True)
  shortest = 15 if model_type == "dinov2" else 12
  wanted = feature(model, _preprocess(theirs, 12, shortest).permute(0, 3, 1, 2))
  weights = np.random.default_rng(1).normal(size=wanted.shape).astype(np.float32)
  (wanted * torch.from_numpy(weights)).sum().backward()

  def loss(images):
    rows = encoder(images)
    return jnp.sum(rows * weights), rows

  gradient, rows = jax.jit(jax.grad(loss, has_aux=True))(images)
  assert encoder.width == 16 and wanted.abs().max() > 0.1
  assert np.abs(np.asarray(rows) - wanted.detach().numpy()).max() <= 1e-5
  assert np.abs(np.asarray(gradient) - theirs.grad.numpy()).max() <= 1e-5 * theirs.grad.abs().max()


@pytest.mark.parametrize("kind", cdm.KINDS)
def test_head_from_its_file(tmp_path, kind):
  head = cdm.Head(kind, 12, 20, 8, rngs=nnx.Rngs(0))
  noise = lambda leaf: 0.1 * jax.random.normal(jax.random.key(1), leaf.shape)
  nnx.update(head, jax.tree.map(lambda leaf: leaf + noise(leaf), nnx.state(head)))
  cdm.save_head(head, tmp_path)
  stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
  theirs = torch.nn.ModuleDict({"fc1": torch.nn.Linear(8 if kind == "residual" else 12, 20),
                                "fc2": torch.nn.Linear(20, 8)})
  theirs.load_state_dict(stored)
  features = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
  x = torch.tensor(features[:, 12:] if kind == "residual" else features[:, :12])
  with torch.no_grad():
    wanted = theirs["fc2"](torch.relu(theirs["fc1"](x))) + (x if kind == "residual" else 0)
  assert wanted.abs().max() > 0.1
  assert np.abs(np.asarray(cdm.load_head(tmp_path)(features)) - wanted.numpy()).max() <= 1e-6
