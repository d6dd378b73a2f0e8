"""Sampling with fewer operations and other images: what is reused or left out is said here, and nowhere by default.

- Guidance switched off: the last calls are made with the prompt alone, half of the work each.
- Deep features reused (DeepCache; Ma et al., arXiv 2312.00858, section 3.3, its uniform rule): of `cache_interval`
  calls one evaluates the whole UNet, the others only what lies above its branch `cache_branch`.

Both are cuts into the same walk: with `Shortcuts()` it is `diffusion.sample`, operation by operation.

Shapes: b image, h w latent position, z latent channel, l prompt position, d text width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from digzsl_jax import diffusion
from digzsl_jax.models import unet


@dataclasses.dataclass(frozen=True)
class Shortcuts:
  """What is left out; by default nothing.

  Attributes:
    guidance_until: the share of the calls, from the first, that are guided.
    cache_interval: calls from one evaluation of the whole UNet to the next, 1 for every call. The first call without
      guidance is a whole one too.
    cache_branch: the deepest skip of the UNet that is evaluated in the other calls; 0 is the shallowest.

  Raises:
    ValueError: a value that means nothing; the message begins with the field.
  """

  guidance_until: float = 1.0
  cache_interval: int = 1
  cache_branch: int = 0

  def __post_init__(self):
    for field, good, legal in (("guidance_until", 0 <= self.guidance_until <= 1, "between 0 and 1"),
                               ("cache_interval", self.cache_interval >= 1, "at least 1"),
                               ("cache_branch", self.cache_branch >= 0, "at least 0")):
      if not good:
        raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {legal}")


def sample(denoiser: unet.UNet2DConditionModel, text_bld: jax.Array, null_bld: jax.Array, scale: float,
           noise_bhwz: jax.Array, sampler: diffusion.Sampler, fresh: diffusion.Fresh | None = None,
           rescale: float = 0.0, shortcuts: Shortcuts = Shortcuts()) -> jax.Array:
  """Latents from standard normal noise, guided: `diffusion.guide` and `diffusion.sample` but for the shortcuts.

  Args:
    denoiser: the UNet.
    text_bld: prompt embeddings.
    null_bld: embeddings of the empty prompt, `[b, l, d]` or `[1, l, d]`.
    scale: guidance scale; 1 is off.
    noise_bhwz: standard normal noise.
    sampler: what walks.
    fresh: see `diffusion.Sampler.run`.
    rescale: see `diffusion.guide`.
    shortcuts: what is left out.

  Raises:
    ValueError: the UNet has no such branch.
  """
  carry, guided = sampler.start(noise_bhwz), round(shortcuts.guidance_until * sampler.calls)
  for start, stop, strength in (0, guided, scale), (guided, sampler.calls, 1):
    if start < stop:
      parts = diffusion.doubled(text_bld, null_bld, strength, rescale)
      carry = _walk(denoiser, *parts, sampler, carry, start, stop, fresh, shortcuts)
  return carry.x_bhwz


def _walk(denoiser, inputs, guided, sampler, carry, start, stop, fresh, shortcuts) -> diffusion.Carry:
  """The calls `start` to `stop - 1`, of which the first is a whole one."""
  if shortcuts.cache_interval == 1 or stop - start == 1:
    denoise = lambda x_bhwz, t: guided(denoiser(*inputs(x_bhwz, t)))
    return sampler.run(denoise, carry, start, stop, fresh)
  branch = shortcuts.cache_branch
  whole = lambda given, deep_bijd: denoiser.predict(*given, branch=branch)
  shallow = lambda given, deep_bijd: denoiser.predict(*given, deep_bijd, branch)

  def denoise(x_bhwz, t, memory):
    age, deep_bijd = memory
    output, deep_bijd = jax.lax.cond(age == 0, whole, shallow, inputs(x_bhwz, t), deep_bijd)
    return guided(output), ((age + 1) % shortcuts.cache_interval, deep_bijd)

  given = jax.eval_shape(inputs, carry.x_bhwz, jnp.asarray(sampler.timesteps[start]))
  deep = jax.eval_shape(whole, given, None)[1]
  memory = jnp.int32(0), jnp.zeros(deep.shape, deep.dtype)
  return sampler.run_with(denoise, carry, memory, start, stop, fresh)[0]
