"""Latent consistency distillation: a denoiser learns to jump to x0 from anywhere on its teacher's guided path.

Luo et al., arXiv 2310.04378, eq. 13, with one guidance scale, which the student then need not take as an input (as in
arXiv 2311.05556, section 3), and the student itself without gradient in the place of its moving average (Song &
Dhariwal, arXiv 2310.14189, section 3.2). Times and the form of the jump are those of the sampler `lcm`.

Shapes: n time from the noisiest on, b row, h w latent position, z latent channel, l prompt position, d text width.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import diffusion, samplers
from digzsl_jax.models import unet

HUBER = 1e-3  # of a latent's unit variance; errors far below it count squared, those far above by their size


class Plan(NamedTuple):
  """The times that the student is trained at, and what latent and output of the network mean there.

  Attributes:
    times_n: int32; the last is 0.
    jumps_n2: f(x, t), the student's x0, as weights of (latent, output) (arXiv 2310.04378, section 4.1); at time 0 it is
      the latent.
    steps_n2: the teacher's DDIM step to the time `skip` places on, or to 0, as weights of (latent, output); none for
      the last.
  """
  times_n: np.ndarray
  jumps_n2: np.ndarray
  steps_n2: np.ndarray


def plan(schedule: diffusion.Schedule, skip: int = 1) -> Plan:
  """The times of the sampler `lcm` on a schedule, all `original_inference_steps` of them, and 0.

  Args:
    schedule: of teacher and student.
    skip: places that the teacher goes at once (arXiv 2310.04378, section 4.3, where it counts time steps of training).

  Raises:
    ValueError: the sampler cannot run on this schedule.
  """
  every = schedule.config.get("original_inference_steps", samplers.ORIGINAL_STEPS)
  jumps = diffusion.make_sampler(schedule, every, "lcm")
  to_zero = dataclasses.replace(schedule, config={**schedule.config, "set_alpha_to_one": False})
  steps_n2 = np.zeros((len(jumps.timesteps), 2), np.float32)
  for first in range(min(skip, len(steps_n2))):
    path = diffusion.make_sampler(to_zero, None, "ddim", timesteps=jumps.timesteps[first::skip])
    steps_n2[first::skip] = path.weights[:, [0, 2]]
  return Plan(np.append(jumps.timesteps, np.int32(0)), np.append(jumps.x0, np.float32([[1, 0]]), axis=0), steps_n2)


def _mix(weights_b2: jax.Array, latents_bhwz: jax.Array, output_bhwz: jax.Array) -> jax.Array:
  latent_b, output_b = jnp.moveaxis(weights_b2, -1, 0)[..., None, None, None]
  return latent_b * latents_bhwz + output_b * output_bhwz


def loss(schedule: diffusion.Schedule, skip: int, guidance: float, text: nnx.GraphDef, teacher: nnx.GraphDef,
         model: unet.UNet2DConditionModel, frozen: tuple[nnx.State, nnx.State, jax.Array], batch, key: jax.Array):
  """How far the student's jump is from the one that it would make after a step of its guided teacher.

  Args:
    schedule: of both.
    skip: see `plan`.
    guidance: scale of the teacher's guidance.
    text: the text tower.
    teacher: the denoiser.
    model: the student.
    frozen: weights of tower and teacher, ids of the empty prompt.
    batch: clean latents `[b, h, w, z]` and ids of their captions.
    key: of times and noise.

  Returns:
    `(mean pseudo-Huber error, metrics)`.
  """
  (latents_bhwz, ids_bl), (text_params, teacher_params, null_l) = batch, frozen
  times_n, jumps_n2, steps_n2 = map(jnp.asarray, plan(schedule, skip))
  time_key, noise_key = jax.random.split(key)
  rows, tower = latents_bhwz.shape[0], nnx.merge(text, text_params)
  text_bld, null_bld = tower(ids_bl)[0], tower(null_l[None])[0]
  n_b = diffusion.stratified(time_key, rows, len(steps_n2))
  noisy_bhwz = diffusion.add_noise(schedule, latents_bhwz, jax.random.normal(noise_key, latents_bhwz.shape),
                                   times_n[n_b])
  guided = diffusion.guide(nnx.merge(teacher, teacher_params), text_bld, null_bld, guidance, stop_unconditional=True)
  moved_bhwz = _mix(steps_n2[n_b], noisy_bhwz, guided(noisy_bhwz, times_n[n_b]))
  jump = lambda x_bhwz, n_b: _mix(jumps_n2[n_b], x_bhwz, model(x_bhwz, times_n[n_b], text_bld))
  next_b = jnp.minimum(n_b + skip, len(steps_n2))
  error_bhwz = jump(noisy_bhwz, n_b) - jax.lax.stop_gradient(jump(moved_bhwz, next_b))
  value = jnp.mean(jnp.sqrt(error_bhwz**2 + HUBER**2) - HUBER)
  return value, {"loss": value}
