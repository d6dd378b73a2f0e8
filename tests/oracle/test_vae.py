"""The autoencoder against diffusers: same folder, same inputs, float32."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax.models import hub, vae  # noqa: E402
from tests.oracle.parity import same_gradient_of_latents, to_numpy, to_torch


def config(levels: int, **fields) -> dict:
  return dict(block_out_channels=(32, 64, 64, 64)[:levels], norm_num_groups=8,
              down_block_types=("DownEncoderBlock2D",) * levels,
              up_block_types=("UpDecoderBlock2D",) * levels, **fields)


CONFIGS = {
  "tiny": config(2), "deep": config(4, layers_per_block=2),
  "bare": config(2, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
                 latent_channels=3, scaling_factor=0.7)}
FILE = "diffusion_pytorch_model.safetensors"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
REFERENCE = diffusers.AutoencoderKL  # for the fixture `reference`


def close(name, got, want):
  print(f"{name}: {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
  np.testing.assert_allclose(got, want, rtol=0, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("name, height, width", [
  ("tiny", 16, 16), ("tiny", 15, 18), ("deep", 32, 24), ("bare", 16, 16)])
def test_encode_and_decode(reference, name, height, width):
  theirs, folder = reference(name)
  graphdef, state = nnx.split(hub.load(vae.AutoencoderKL, folder))
  images_bhwc = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
  with torch.no_grad():
    posterior = theirs.encode(to_torch(images_bhwc)).latent_dist
    want_bhwc = to_numpy(theirs.decode(posterior.mean).sample)

  def both(state, images_bhwc):
    model = nnx.merge(graphdef, state)
    mean_bhwz, logvar_bhwz = model.encode(images_bhwc)
    return mean_bhwz, logvar_bhwz, model.decode(mean_bhwz)

  mean_bhwz, logvar_bhwz, out_bhwc = jax.jit(both)(state, images_bhwc)
  assert np.abs(want_bhwc).max() > 0.3
  close(f"{name} mean", mean_bhwz, to_numpy(posterior.mean))
  close(f"{name} log variance", logvar_bhwz, to_numpy(posterior.logvar))
  close(f"{name} image", out_bhwc, want_bhwc)
  assert nnx.merge(graphdef, state).scaling_factor == theirs.config.scaling_factor


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_latents(reference, remat):
  theirs, folder = reference("tiny")
  same_gradient_of_latents(theirs, hub.load(vae.AutoencoderKL, folder, remat=remat), 8)


def test_attention_names_of_old_folders(reference, tmp_path):
  theirs, folder = reference("tiny")
  tensors = safetensors.numpy.load_file(folder / FILE)
  for now, old in OLD.items():
    tensors = {key.replace(f"attentions.0.{now}.", f"attentions.0.{old}."): t for key, t in tensors.items()}
  assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
  safetensors.numpy.save_file(tensors, tmp_path / FILE, {"format": "pt"})
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  # The reference reads such a folder too: the fixture is a real one.
  again = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict()
  assert all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())
  old, now = (nnx.state(hub.load(vae.AutoencoderKL, path)) for path in (tmp_path, folder))
  jax.tree.map(np.testing.assert_array_equal, old, now)
