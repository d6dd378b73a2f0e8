"""UNet and autoencoder of Stable Diffusion without the reference: sizes, configs, dtypes, memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax.models import hub, stable_diffusion, unet, vae

SD15 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
          "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
UNET = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": 24, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 4}
VAE = {"block_out_channels": [32, 64], "norm_num_groups": 8,
       "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


def abstract(model_type, config, **switches):
  return hub.abstract(model_type, config, **switches)


@functools.cache
def weights(model_type):
  """Eager initialisation of these models is slow, so: made abstractly, filled by numpy."""
  state = nnx.state(abstract(model_type, UNET if model_type is unet.UNet2DConditionModel else VAE))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[:-1]) or 1),
                                            jnp.float32), state)


def run(model_type, config, function, *arrays, **switches):
  graphdef = nnx.graphdef(abstract(model_type, config, **switches))
  return jax.jit(lambda state, *a: function(nnx.merge(graphdef, state), *a))(weights(model_type), *arrays)


@pytest.mark.parametrize("model_type, config, count", [
  (unet.UNet2DConditionModel, SD15, 859_520_964), (unet.UNet2DConditionModel, SD21, 865_910_724),
  (vae.AutoencoderKL, SD_VAE, 83_653_863)], ids=["sd15", "sd21", "vae"])
def test_published_parameter_counts(model_type, config, count):
  leaves = jax.tree.leaves(nnx.state(abstract(model_type, config), nnx.Param))
  assert sum(leaf.size for leaf in leaves) == count


def unet_inputs(size=(8, 8)):
  normal = functools.partial(jax.random.normal, dtype=jnp.float32)
  return normal(jax.random.key(1), (2, *size, 4)), jnp.array([999, 17]), normal(jax.random.key(2), (2, 5, 24))


@functools.cache
def eps(dtype=jnp.float32):
  return run(unet.UNet2DConditionModel, UNET, lambda model, *a: model(*a), *unet_inputs(), dtype=dtype)


def test_unet_in_bfloat16():
  assert eps().shape == (2, 8, 8, 4) and eps().dtype == jnp.float32
  assert eps(jnp.bfloat16).dtype == jnp.bfloat16
  scale = float(jnp.abs(eps()).max())
  np.testing.assert_allclose(np.float32(eps(jnp.bfloat16)), eps(), atol=0.05 * scale)


def test_unet_rows_are_independent_and_one_time_serves_all():
  x_bhwz, t_b, text_bld = unet_inputs()
  row = run(unet.UNet2DConditionModel, UNET, lambda model, *a: model(*a), x_bhwz[:1], t_b[0], text_bld[:1])
  np.testing.assert_allclose(row, eps()[:1], atol=1e-5)


def test_vae_in_bfloat16_ends_in_float32():
  images_bhwc = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3), minval=-1)
  both = lambda model, x: (*model.encode(x), model.decode(model.encode(x)[0]))
  exact = run(vae.AutoencoderKL, VAE, both, images_bhwc)
  rough = run(vae.AutoencoderKL, VAE, both, images_bhwc, dtype=jnp.bfloat16)
  for want, got, shape in zip(exact, rough, [(1, 8, 8, 4), (1, 8, 8, 4), (1, 16, 16, 3)]):
    assert got.shape == want.shape == shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.05 * float(jnp.abs(want).max()))


def test_vae_clips_log_variance():
  def logvar(model, images_bhwc):
    model.quant_conv.bias[...] = jnp.array([0, 0, 0, 0, 1e3, 1e3, -1e3, -1e3])
    return model.encode(images_bhwc)[1]
  logvar_bhwz = run(vae.AutoencoderKL, VAE, logvar, jnp.zeros((1, 4, 4, 3)))
  np.testing.assert_array_equal(logvar_bhwz[0, 0, 0], [20, 20, -30, -30])


def test_vae_keeps_the_configs_scale():
  assert abstract(vae.AutoencoderKL, {**VAE, "scaling_factor": 0.5}).scaling_factor == 0.5
  assert vae.VAEConfig.from_json(VAE).scaling_factor == 0.18215


def test_configs():
  config = unet.UNetConfig.from_json(SD15)
  assert config.heads == (8, 8, 8, 8)
  assert unet.UNetConfig.from_json(SD21).heads == (5, 10, 20, 20)
  assert unet.UNetConfig.from_json({**SD21, "num_attention_heads": 4}).heads == (4, 4, 4, 4)
  assert unet.UNetConfig.from_json({**SD21, "num_attention_heads": None}).heads == (5, 10, 20, 20)
  # Neutral values of later switches, and words that change nothing, pass.
  assert unet.UNetConfig.from_json({
    **SD15, "_class_name": "UNet2DConditionModel", "class_embed_type": None,
    "only_cross_attention": [False] * 4, "transformer_layers_per_block": [1] * 4, "upcast_attention": True,
    "decay": 0.9999}) == config
  assert {hash(config), hash(dataclasses.replace(config))} == {hash(config)}


@pytest.mark.parametrize("field, value", [
  ("class_embed_type", "timestep"), ("addition_embed_type", "text_time"), ("num_class_embeds", 1000),
  ("act_fn", "gelu"), ("time_embedding_type", "fourier"), ("conv_in_kernel", 1), ("encoder_hid_dim", 4096),
  ("resnet_time_scale_shift", "scale_shift"), ("transformer_layers_per_block", [1, 2]),
  ("only_cross_attention", [True, False]), ("dual_cross_attention", True), ("downsample_padding", 0),
  ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"), ("mid_block_type", None),
  ("down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D"]), ("down_block_types", ["DownBlock2D"]),
  ("up_block_types", ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]), ("attention_head_dim", [4]),
  ("attention_head_dim", 5), ("attention_head_dim", None), ("attention_head_dim", 0),
  ("num_attention_heads", [2, 3]), ("norm_num_groups", 7), ("norm_num_groups", None),
  ("layers_per_block", [1, 1]), ("cross_attention_dim", [24, 24]),
  ("block_out_channels", "32, 64"), ("block_out_channels", [])])
def test_unet_config_names_the_field_it_cannot_serve(field, value):
  with pytest.raises(ValueError, match=f"UNet config: {field}="):
    unet.UNetConfig.from_json({**UNET, field: value})


@pytest.mark.parametrize("field, value", [
  ("down_block_types", ["AttnDownEncoderBlock2D"] * 2), ("up_block_types", ["UpDecoderBlock2D"]),
  ("act_fn", "relu"), ("shift_factor", 0.1), ("latents_mean", [0, 0, 0, 0]), ("norm_num_groups", 48),
  ("scaling_factor", None)])
def test_vae_config_names_the_field_it_cannot_serve(field, value):
  with pytest.raises(ValueError, match=f"VAE config: {field}="):
    vae.VAEConfig.from_json({**VAE, field: value})


def test_text_of_another_width_is_refused():
  x_bhwz, t_b, _ = unet_inputs()
  with pytest.raises(ValueError, match="32 wide.*cross_attention_dim is 24"):
    jax.eval_shape(abstract(unet.UNet2DConditionModel, UNET), x_bhwz, t_b, jnp.zeros((2, 5, 32)))


@pytest.mark.parametrize("name, now", [
  ("decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"),
  ("encoder.mid_block.attentions.0.key.bias", "encoder.mid_block.attentions.0.to_k.bias"),
  ("encoder.mid_block.attentions.0.value.bias", "encoder.mid_block.attentions.0.to_v.bias"),
  ("encoder.mid_block.attentions.0.proj_attn.weight", "encoder.mid_block.attentions.0.to_out.0.weight"),
  ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid_block.attentions.0.to_out.0.weight"),
  ("quant_conv.weight", "quant_conv.weight"), ("query.weight", "query.weight")])
def test_old_names_of_the_vae(name, now):
  assert vae.AutoencoderKL.canonical_name(name) == now


def test_large_pictures_are_decoded_a_few_at_a_time(monkeypatch):
  graphdef, state, sizes = nnx.graphdef(abstract(vae.AutoencoderKL, VAE)), weights(vae.AutoencoderKL), []

  class Sized(vae.AutoencoderKL):
    def decode(self, latents_bhwz):
      sizes.append(len(latents_bhwz))
      return super().decode(latents_bhwz)

  def pixels(latents_bhwz):
    sd = stable_diffusion.StableDiffusion(None, None, nnx.merge(graphdef, state))
    sd.vae.__class__ = Sized
    return sd.pixels(latents_bhwz)

  latents_bhwz = jax.random.normal(jax.random.key(0), (6, 8, 8, 4))
  whole = jax.jit(pixels)(latents_bhwz)
  monkeypatch.setattr(stable_diffusion, "PIXELS", 5 * 16 * 16)  # five fit, but three divide six
  parts = jax.jit(lambda x: pixels(x))(latents_bhwz)
  assert sizes == [6, 3] and parts.shape == whole.shape == (6, 16, 16, 3) and parts.dtype == jnp.uint8
  assert np.abs(np.int32(parts) - np.int32(whole)).max() <= 1 and np.asarray(whole).std() > 10


CALLS = {  # model type, config, function, its first argument, the others
  "unet": (unet.UNet2DConditionModel, UNET, lambda model, text, x, t: model(x, t, text),
           (2, 5, 24), (2, 16, 16, 4), (2,)),
  "decoder": (vae.AutoencoderKL, VAE, vae.AutoencoderKL.decode, (2, 16, 16, 4)),
  "encoder": (vae.AutoencoderKL, VAE, vae.AutoencoderKL.encode, (2, 16, 16, 3))}


def loss_of(name, remat):
  """A function to differentiate by its first argument, and the shapes of its arguments."""
  model_type, config, function, *shapes = CALLS[name]
  graphdef, state = nnx.split(abstract(model_type, config, remat=remat))

  def loss(x, state, *rest):
    return sum((out ** 2).sum() for out in jax.tree.leaves(function(nnx.merge(graphdef, state), x, *rest)))
  first, *rest = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return loss, (first, state, *rest)


@pytest.mark.parametrize("name", CALLS)
def test_remat_keeps_less_for_the_backward_pass(name):
  def kept(remat):
    loss, (first, *rest) = loss_of(name, remat)
    backward = jax.eval_shape(lambda x, *rest: jax.vjp(lambda x: loss(x, *rest), x)[1], first, *rest)
    activations = [leaf for leaf in jax.tree.leaves(backward) if leaf.ndim > 2 and leaf.shape[0] == 2]
    return sum(leaf.size for leaf in activations)

  print(name, kept(True), kept(False))
  assert kept(True) < 0.25 * kept(False)


@pytest.mark.parametrize("name", ["unet", "decoder"])
def test_remat_lowers_the_compiled_models_memory(name):
  """With XLA:CPU's own scheduler, which starts everything as early as its inputs allow."""
  def temporary(remat):
    loss, arguments = loss_of(name, remat)
    return jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

  kept, again = temporary(False), temporary(True)
  print(kept, again)
  assert again < 0.65 * kept
