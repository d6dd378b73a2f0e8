"""TAESD against diffusers: same folder, same inputs, float32."""

import jax
import numpy as np
import pytest
import safetensors.torch
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax.models import stable_diffusion, taesd
from tests.oracle.parity import same_gradient_of_latents, to_numpy, to_torch

CONFIGS = {
  "tiny": dict(encoder_block_out_channels=(16, 16), decoder_block_out_channels=(24, 24), num_encoder_blocks=(1, 2),
               num_decoder_blocks=(2, 1), latent_channels=3, scaling_factor=0.7),
  "deep": dict(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4)}


def REFERENCE(gain=1.6, **config):  # for the fixture `reference`
  """With PyTorch's own first weights nothing of an image would be left after so many layers without norm."""
  model = diffusers.AutoencoderTiny(**config)
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, torch.nn.Conv2d):
        module.weight *= gain
  return model


def close(name, got, want):
  print(f"{name}: {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
  assert 0.1 < want.std(axis=(1, 2)).max() < 3  # it depends on the input
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5, err_msg=name)


def compare(theirs, ours, name, height, width, seed=0):
  """Encodes random images and decodes latents that reach beyond the bound."""
  rng, factor = np.random.default_rng(seed), ours.factor
  images_bhwc = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
  images_bhwc = images_bhwc * np.linspace(0, 1, width, dtype=np.float32)[:, None]
  latents_bhwz = 3 * rng.normal(size=(2, height // factor, width // factor, ours.config.latent_channels))
  latents_bhwz = latents_bhwz.astype(np.float32)
  with torch.no_grad():
    want_bhwz = to_numpy(theirs.encode(to_torch(images_bhwc)).latents)
    want_bhwc = to_numpy(theirs.decode(to_torch(latents_bhwz)).sample)
  graphdef, state = nnx.split(ours)

  def both(state, images_bhwc, latents_bhwz):
    model = nnx.merge(graphdef, state)
    return *model.encode(images_bhwc), model.decode(latents_bhwz)

  mean_bhwz, logvar_bhwz, out_bhwc = jax.jit(both)(state, images_bhwc, latents_bhwz)
  assert np.abs(latents_bhwz).max() > 2 * taesd.LATENT_BOUND and want_bhwc.shape == images_bhwc.shape
  close(f"{name} latents", mean_bhwz, want_bhwz)
  close(f"{name} images", out_bhwc, want_bhwc)
  np.testing.assert_array_equal(np.exp(0.5 * logvar_bhwz), np.zeros_like(want_bhwz))


@pytest.mark.parametrize("name, height, width", [("tiny", 16, 20), ("deep", 32, 24)])
def test_encode_and_decode(reference, name, height, width):
  theirs, folder = reference(name)
  ours = stable_diffusion.load_autoencoder(folder)
  assert type(ours) is taesd.AutoencoderTiny and ours.scaling_factor == theirs.config.scaling_factor
  compare(theirs, ours, name, height, width)


def test_odd_heights_are_encoded_alike(reference):
  theirs, folder = reference("deep")
  graphdef, state = nnx.split(stable_diffusion.load_autoencoder(folder))
  images_bhwc = np.random.default_rng(0).uniform(-1, 1, (1, 27, 30, 3)).astype(np.float32)
  with torch.no_grad():
    want_bhwz = to_numpy(theirs.encode(to_torch(images_bhwc)).latents)
  close("latents", jax.jit(lambda s, x: nnx.merge(graphdef, s).encode(x)[0])(state, images_bhwc), want_bhwz)


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_latents(reference, remat):
  theirs, folder = reference("deep")
  same_gradient_of_latents(theirs, stable_diffusion.load_autoencoder(folder, remat=remat), 4)


def test_weights_as_the_author_stores_them(tmp_path, real_data_if_any):
  """Random ones, and the published ones where they are at hand: no test of parity may be skipped."""
  theirs = REFERENCE(gain=1.7).eval()
  # His decoder is a sequence that begins with the bounding of latents, which has no weights.
  sequences = [torch.nn.Sequential(*[torch.nn.Identity()] * first, *tower.layers)
               for tower, first in ((theirs.encoder, 0), (theirs.decoder, 1))]
  for sequence, name in zip(sequences, taesd.RAW_FILES):
    safetensors.torch.save_file(sequence.state_dict(), tmp_path / name)
  compare(theirs, stable_diffusion.load_autoencoder(tmp_path), "random", 64, 48)
  if real_data_if_any:
    for sequence, name in zip(sequences, taesd.RAW_FILES):
      sequence.load_state_dict(safetensors.torch.load_file(real_data_if_any / "taesd" / name))
    compare(theirs, stable_diffusion.load_autoencoder(real_data_if_any / "taesd"), "published", 64, 48)
