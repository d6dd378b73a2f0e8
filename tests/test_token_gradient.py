"""The gradient that learns a class token, against finite differences of the same compiled steps.

The gradient is read off the optimiser: after one unclipped update, AdamW's first moment is a tenth of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import quickstart
from digzsl_jax import diffusion, mesh
from digzsl_jax.base_workspace import parse
from digzsl_jax.models import cdm, clip, hub, stable_diffusion, unet, vae
from digzsl_jax.runs import class_tokens

WIDTH, SLOTS = 8, 17  # of a token; slot 0 and one for each direction there and back
STEP = 0.01  # of the differences, on tokens of order 1
TOWER = dict(hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
TEXT = TOWER | dict(vocab_size=12, max_position_embeddings=5, eos_token_id=11)
CLIP = {"text_config": TEXT, "vision_config": TOWER | dict(image_size=4, patch_size=2), "projection_dim": 8}
UNET = dict(sample_size=4, block_out_channels=[8], layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
            cross_attention_dim=WIDTH, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
VAE = dict(block_out_channels=[8], norm_num_groups=4, scaling_factor=0.6, mid_block_add_attention=False)
SCHEDULE = diffusion.Schedule.from_config(dict(
  _class_name="DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
  clip_sample=False, timestep_spacing="trailing"))  # the last call is not at the noise-free end
PATHS = {
  "x0": dict(gradient="x0", steps=2, x0_timestep=500, grad_calls=1),
  "one call": dict(gradient="last", sampler="ddim", steps=3, grad_calls=1),
  "two calls": dict(gradient="last", sampler="ddim", steps=3, grad_calls=2),
  "all calls": dict(gradient="last", sampler="ddim", steps=2, grad_calls=2)}


def filled(kind, config):
  """A model with every parameter random and none neutral; made abstractly, as eager initialisation is slow."""
  model, rng = hub.abstract(kind, config), np.random.default_rng(0)

  def draw(p):
    noise = rng.normal(size=p.shape)
    return jnp.asarray(1 + 0.3 * noise if p.ndim == 1 else 1.5 * noise / np.prod(p.shape[:-1]) ** 0.5, jnp.float32)

  nnx.update(model, jax.tree.map(draw, nnx.state(model)))
  return model


@functools.cache
def small_guide():
  """Every module of the pipeline in its smallest form."""
  sd = stable_diffusion.StableDiffusion(filled(clip.CLIPTextModel, TEXT), filled(unet.UNet2DConditionModel, UNET),
                                        filled(vae.AutoencoderKL, VAE))
  head = filled(cdm.Head, {"kind": "mlp", "width": WIDTH, "hidden": 8, "outputs": 8})
  return class_tokens.Guide(sd, cdm.CDM(cdm.Encoder(filled(clip.CLIPModel, CLIP), "without preprocessor"), head))


class Toy(nnx.Module):
  """In the place of Stable Diffusion: compiles in a second, and shows which calls a gradient passes through."""

  latent_shape = (2, 2, WIDTH)

  def __init__(self):
    self.mix_zz = nnx.Param(0.4 * jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)))

  def text(self, ids_bl, vectors_bnd=None):
    return jnp.zeros((1, 1, WIDTH)) if vectors_bnd is None else vectors_bnd

  def unet(self, x_bhwz, t_b, text_bld):
    return jnp.sin(x_bhwz @ self.mix_zz[...] + text_bld[:, None] + t_b[:, None, None, None] / 1000)

  def decode(self, latents_bhwz):
    return jnp.sin(latents_bhwz / 2)  # unlike tanh, lets gradient through wherever the latents lie


class ToyCDM(nnx.Module):

  def __call__(self, images_bhwc):
    return images_bhwc.mean((1, 2))


@functools.cache
def learn(path: str, stop_unconditional: bool, real: bool = False, grad_images: int = 0):
  """The gradient at slot 0's token, `[d]`, and the losses there and a step aside along every axis, `[s]`."""
  settings = parse(class_tokens.Settings, quickstart.get_config().tokens.to_dict() | PATHS[path] | dict(
    stop_unconditional=stop_unconditional, images=2, clip_norm=1e9, temperature=0.3, guidance=3.0, slots=SLOTS,
    slots_per_body=SLOTS, grad_images=grad_images), "tokens")
  rng = np.random.default_rng(1)
  classes = class_tokens.Classes(
    label_k=jnp.array([5, 3, 4]), allowed_k=jnp.array([True] * 3),
    ids_kl=jnp.array([[10, 1, 12, 3, 11], [10, 12, 7, 11, 11], [10, 4, 12, 5, 11]]),  # 12 is S*
    prototypes_kd=jnp.asarray(rng.normal(size=(3, 8)), jnp.float32), null_l=jnp.array([10, 11, 11, 11, 11]))
  graphdef, params = nnx.split(small_guide() if real else class_tokens.Guide(Toy(), ToyCDM()))
  frozen = class_tokens.Frozen(params, classes)
  steps = class_tokens.compile_steps(settings, 0, class_tokens.gradient_path(settings, SCHEDULE), graphdef,
                                     mesh.make(1))
  start_knd = np.tile(rng.normal(size=WIDTH).astype(np.float32), (3, 1, 1))
  slots = class_tokens.fresh_slots(settings, np.ones(SLOTS), start_knd)
  carry = steps[0](frozen, slots)  # from slot 0's token for all: up to here nothing is differentiated
  aside_sd = STEP * np.concatenate([np.zeros((1, WIDTH)), np.eye(WIDTH), -np.eye(WIDTH)])
  slots = slots._replace(token_cnd=slots.token_cnd + jnp.asarray(aside_sd[:, None], jnp.float32))
  slots, made = steps[1](frozen, slots, carry)
  return np.array(optax.tree.get(slots.optimiser, "mu")[0, 0] / 0.1), np.array(made.loss_c)


def error(got, want):
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("path, stop_unconditional, real", [
  ("x0", True, False), ("one call", True, False), ("two calls", False, False), ("all calls", False, True)])
def test_differences(path, stop_unconditional, real):
  gradient_d, loss_s = learn(path, stop_unconditional, real)
  found_d = (loss_s[1:1 + WIDTH] - loss_s[1 + WIDTH:]) / (2 * STEP)
  print(f"{path}: {error(found_d, gradient_d):.1e} of {np.linalg.norm(gradient_d):.2g}, loss {loss_s[0]:.2f}")
  assert np.linalg.norm(gradient_d) > 0.02
  assert error(found_d, gradient_d) < 0.005


def test_the_unconditional_half_carries_gradient_from_the_second_call_on():
  stopped = {path: error(learn(path, True)[0], learn(path, False)[0]) for path in ("one call", "two calls")}
  print(stopped)
  assert stopped["one call"] < 1e-6
  assert stopped["two calls"] > 0.05


@pytest.mark.parametrize("path, real", [("x0", False), ("two calls", False), ("all calls", True)])
def test_images_one_by_one_have_the_same_gradient(path, real):
  for whole, parts in zip(learn(path, False, real), learn(path, False, real, grad_images=1)):
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
