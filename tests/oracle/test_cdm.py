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


def _preprocess(images_bijc, size):
  """The steps of CLIP's image processor, without Pillow's rounding to integers."""
  images = (torch.as_tensor(images_bijc).permute(0, 3, 1, 2) + 1) / 2
  shortest = min(images.shape[2:])
  scaled = [size * side // shortest for side in images.shape[2:]]
  if shortest != size:
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
