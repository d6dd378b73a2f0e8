"""The UNet against diffusers: same folder, same inputs, float32."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax.models import hub, unet  # noqa: E402

TINY = dict(
  sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, norm_num_groups=8,
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
DEEP = dict(sample_size=16, block_out_channels=(32, 32, 64, 64), layers_per_block=2, cross_attention_dim=24,
            norm_num_groups=16)  # diffusers' default block types are those of Stable Diffusion
CONFIGS = {
  "sd15": dict(TINY, attention_head_dim=8),
  "sd21": dict(TINY, attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True),
  "unusual": dict(TINY, attention_head_dim=2, flip_sin_to_cos=False, freq_shift=1, mid_block_scale_factor=1.5,
                  norm_eps=1e-3, in_channels=5, norm_num_groups=16),
  "deep15": dict(DEEP, attention_head_dim=8),
  "deep21": dict(DEEP, layers_per_block=1, attention_head_dim=[1, 2, 4, 8], use_linear_projection=True)}
REFERENCE = diffusers.UNet2DConditionModel  # for the fixture `reference`


def inputs(config: dict, height: int, width: int):
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return normal(2, height, width, config.get("in_channels", 4)), np.array([999, 17]), normal(2, 7, 24)


def reference_eps(theirs, x_bhwz, t_b, text_bld):
  x_bzhw, t_b = torch.from_numpy(np.moveaxis(x_bhwz, -1, 1).copy()), torch.from_numpy(t_b)
  return theirs(x_bzhw, t_b, text_bld).sample.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name, height, width", [
  ("sd15", 8, 8), ("sd15", 7, 9), ("sd21", 8, 8), ("unusual", 8, 6), ("deep15", 8, 8), ("deep21", 11, 16)])
def test_noise(reference, name, height, width):
  theirs, folder = reference(name)
  graphdef, state = nnx.split(hub.load(unet.UNet2DConditionModel, folder))
  x_bhwz, t_b, text_bld = inputs(CONFIGS[name], height, width)
  with torch.no_grad():
    want_bhwz = reference_eps(theirs, x_bhwz, t_b, torch.from_numpy(text_bld)).numpy()
  eps_bhwz = jax.jit(lambda state, *a: nnx.merge(graphdef, state)(*a))(state, x_bhwz, t_b, text_bld)
  assert 0.5 < np.abs(want_bhwz).max() < 5
  print(f"{name} {height}x{width}: {np.abs(eps_bhwz - want_bhwz).max():.1e} of {np.abs(want_bhwz).max():.1f}")
  np.testing.assert_allclose(eps_bhwz, want_bhwz, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, remat", [("sd15", True), ("sd21", False)])
def test_gradients(reference, name, remat):
  """Of the text, which learns tokens, and of every parameter, which pre-training follows."""
  theirs, folder = reference(name)
  graphdef, state = nnx.split(hub.load(unet.UNet2DConditionModel, folder, remat=remat))
  x_bhwz, t_b, text_bld = inputs(CONFIGS[name], 8, 8)
  weight_bhwz = np.random.default_rng(2).normal(size=x_bhwz.shape).astype(np.float32)
  text = torch.from_numpy(text_bld).requires_grad_()
  theirs.zero_grad()
  (reference_eps(theirs, x_bhwz, t_b, text) * torch.from_numpy(weight_bhwz)).sum().backward()
  # `fill` knows the axes of a kernel: it gives the reference's gradients the shapes of ours.
  want = hub.fill(hub.abstract(unet.UNet2DConditionModel, theirs.config),
                  {key: p.grad.numpy() for key, p in theirs.named_parameters()}, source="gradients")

  def loss(text_bld, state):
    return (nnx.merge(graphdef, state)(x_bhwz, t_b, text_bld) * weight_bhwz).sum()

  def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()

  grad_bld, grads = jax.jit(jax.grad(loss, (0, 1)))(text_bld, state)
  errors = {path: error(got[...], want[...]) for (path, got), (_, want) in
            zip(nnx.to_flat_state(grads), nnx.to_flat_state(nnx.state(want)))}
  errors["text"] = error(grad_bld, text.grad.numpy())
  print(f"{name} gradients: text {errors['text']:.1e}, worst {max(errors.values()):.1e} relative")
  assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def test_diffusers_opens_what_we_save(reference, tmp_path):
  theirs, folder = reference("sd21")
  hub.save(hub.load(unet.UNet2DConditionModel, folder), tmp_path, dict(theirs.config), dtype=np.float32,
           file_name="diffusion_pytorch_model.safetensors")
  again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict()
  assert again.keys() == theirs.state_dict().keys()
  assert all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())
