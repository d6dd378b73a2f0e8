"""Shortcuts of sampling: exact where they are off, what they leave out where on; and what XLA does by itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import diffusion, shortcuts
from digzsl_jax.models import hub, unet

TEXT, WORDS = 24, 5
UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": TEXT,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 2}
SCHEDULE = diffusion.Schedule.from_config(dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear",
                                               beta_start=0.00085, beta_end=0.012, clip_sample=False))
CALLS, SCALE = 5, 4.0


@functools.cache
def weights():
  graphdef, state = nnx.split(hub.abstract(unet.UNet2DConditionModel, UNET))
  rng = np.random.default_rng(0)
  return graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[:-1]) or 1),
                                                      jnp.float32), state)


def given():
  """Noise, text and the empty prompt."""
  return [jax.random.normal(jax.random.key(n), shape) for n, shape in
          enumerate(((3, 8, 8, 4), (3, WORDS, TEXT), (1, WORDS, TEXT)))]


def compiled(function):
  """`function(denoiser, noise_bhwz, text_bld, null_bld)`."""
  graphdef, state = weights()
  return jax.jit(lambda state, *given: function(nnx.merge(graphdef, state), *given)).lower(state, *given()).compile()


def latents(function):
  return np.asarray(compiled(function)(weights()[1], *given()))


def shortened(*left_out, kind="ddim", scale=SCALE):
  sampler = diffusion.make_sampler(SCHEDULE, CALLS, kind)
  return lambda denoiser, noise_bhwz, text_bld, null_bld: shortcuts.sample(
    denoiser, text_bld, null_bld, scale, noise_bhwz, sampler, shortcuts=shortcuts.Shortcuts(*left_out))


@functools.cache
def exact():
  sampler = diffusion.make_sampler(SCHEDULE, CALLS, "ddim")
  return latents(lambda denoiser, noise_bhwz, text_bld, null_bld: diffusion.sample(
    diffusion.guide(denoiser, text_bld, null_bld, SCALE), noise_bhwz, sampler))


@pytest.mark.parametrize("left_out", [(), (1.0, 1, 3)])
def test_exact_where_they_are_off(left_out):
  np.testing.assert_array_equal(latents(shortened(*left_out)), exact())


def test_guidance_ends_after_its_share_of_the_calls():
  sampler = diffusion.make_sampler(SCHEDULE, CALLS, "ddim")

  def by_hand(denoiser, noise_bhwz, text_bld, null_bld):
    guided, alone = (diffusion.guide(denoiser, text_bld, null_bld, scale) for scale in (SCALE, 1))
    return sampler.run(alone, sampler.run(guided, sampler.start(noise_bhwz), 0, 2), 2, CALLS).x_bhwz

  found = latents(shortened(0.4))
  np.testing.assert_array_equal(found, latents(by_hand))
  assert np.abs(found - exact()).max() > 0.05
  np.testing.assert_array_equal(latents(shortened(0.0)), latents(shortened(scale=1)))


def test_deep_features_are_taken_from_the_last_whole_call():
  """Call by call in Python, as the text above `Shortcuts` says; tests/oracle has the rule in PyTorch."""
  graphdef, state = weights()
  noise_bhwz, text_bld, null_bld = given()
  sampler, branch, deep = diffusion.make_sampler(SCHEDULE, CALLS, "ddim"), 1, None
  inputs, guided = diffusion.doubled(text_bld, null_bld, SCALE)
  whole, shallow = (jax.jit(function) for function in (
    lambda state, *call: nnx.merge(graphdef, state).predict(*call, branch=branch),
    lambda state, *call: nnx.merge(graphdef, state).predict(*call, branch)))
  x_bhwz, wholes = noise_bhwz, []
  for call in range(CALLS):
    seen = inputs(x_bhwz, jnp.asarray(sampler.timesteps[call]))
    if call % 2 == 0:
      wholes.append(call)
      output, deep = whole(state, *seen)
    else:
      output, _ = shallow(state, *seen, deep)
    x_bhwz = sampler.weights[call, 0] * x_bhwz + sampler.weights[call, 2] * guided(output)
  found = latents(shortened(1.0, 2, branch))
  assert wholes == [0, 2, 4]
  np.testing.assert_allclose(found, x_bhwz, rtol=0, atol=1e-5)
  assert np.abs(found - exact()).max() > 1e-3


def test_shallow_part_with_features_of_the_same_call_is_the_whole():
  graphdef, state = weights()
  noise_bhwz, text_bld, _ = given()

  @functools.partial(jax.jit, static_argnums=1)
  def both(state, branch):
    denoiser, call = nnx.merge(graphdef, state), (noise_bhwz, jnp.int32(500), text_bld)
    whole, deep = denoiser.predict(*call, branch=branch)
    return denoiser(*call), whole, denoiser.predict(*call, deep, branch)[0]

  assert nnx.merge(graphdef, state).branches == 4
  for branch in (0, 3):
    plain, *others = both(state, branch)
    for other in others:
      np.testing.assert_allclose(other, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("left_out, message", [
  ((1.5, 1, 0), "^guidance_until is 1.5; it must be between 0 and 1"), ((1.0, 0, 0), "^cache_interval is 0"),
  ((1.0, 2, -1), "^cache_branch is -1"), ((1.0, 2, 4), "branch is 4; this UNet has the branches 0 to 3")])
def test_refusals(left_out, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda *given: shortened(*left_out)(nnx.merge(*weights()), *given), *given())


def test_keys_and_values_of_the_prompt_are_made_outside_of_the_loop():
  """XLA takes them out of the loop over calls, so sampling does not by itself."""
  program = compiled(shortened()).as_text()
  inside, computation = set(), None
  made = []  # computations that multiply text states
  for line in program.splitlines():
    if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      computation = head[1]
    if re.search(r" (dot|fusion|custom-call)\(", line) and re.search(rf"f32\[{6 * WORDS},(8|16)\]", line.split("(")[0]):
      made.append(computation)
    inside |= set(re.findall(r"body=%?([\w.-]+)", line))
  assert inside and made
  assert not inside & set(made)
