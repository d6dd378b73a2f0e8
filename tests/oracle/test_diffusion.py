"""Schedules and samplers against `diffusers`: every timestep and every intermediate latent."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax import diffusion

CLASSES = {
  "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False)),
  "pndm": (diffusers.PNDMScheduler, dict(skip_prk_steps=True)),
  "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
}
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
NOISE = np.random.default_rng(0).standard_normal((2, 2, 3, 2)).astype(np.float32)


def toy(np_like, x, t):
  """A nonlinear denoiser under which latents stay of order 1, for either meaning of its output."""
  u = (t + 1) / 1000
  return u * x + (1 - u) * np_like.tanh(2 * x + 3 * u) / 2


def read(scheduler):
  """The schedule of the file that `scheduler` writes."""
  return diffusion.Schedule.from_config(json.loads(scheduler.to_json_string()))


def theirs(scheduler, noise):
  latents = [noise]
  for t in scheduler.timesteps:
    latents.append(scheduler.step(toy(torch, latents[-1], t.float()), t, latents[-1]).prev_sample)
  return latents


def check(scheduler, steps, sampler):
  scheduler.set_timesteps(steps)
  expected = theirs(scheduler, torch.from_numpy(NOISE))
  assert expected[-1].abs().max() < 20
  timesteps = []

  def denoise(x_bhwz, t):
    timesteps.append(int(t))
    return toy(jnp, x_bhwz, t)

  carries = [sampler.start(jnp.asarray(NOISE))]
  with jax.disable_jit():  # nothing to compile, and `t` is concrete
    for call in range(sampler.calls):
      carries.append(sampler.run(denoise, carries[-1], call, call + 1))
  assert timesteps == scheduler.timesteps.tolist() == sampler.timesteps.tolist()
  ours = np.stack([carry.x_bhwz for carry in carries])
  print(f"trajectory: {np.abs(ours - np.stack(expected)).max():.1e} of {np.abs(ours).max():.1f}")
  np.testing.assert_allclose(ours, np.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", CLASSES)
def test_trajectories(kind, prediction, spacing):
  cls, extra = CLASSES[kind]
  scheduler = cls(**STABLE_DIFFUSION, **extra, prediction_type=prediction, timestep_spacing=spacing)
  schedule = read(scheduler)
  assert schedule.kind == kind
  for steps in (1, 2, 3, 4, 5, 7, 12, 30, 50):
    check(scheduler, steps, diffusion.make_sampler(schedule, steps))


@pytest.mark.parametrize("change", [
  dict(set_alpha_to_one=True), dict(set_alpha_to_one=False), dict(steps_offset=0),
  dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"),
  dict(num_train_timesteps=200, trained_betas=np.linspace(0.001, 0.05, 200).tolist()),
  dict(euler_at_final=True), dict(lower_order_final=False),
], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_settings(kind, change):
  cls, extra = CLASSES[kind]
  config = {**STABLE_DIFFUSION, **extra, "prediction_type": "v_prediction", **change}
  scheduler = cls.from_config(config)
  schedule = diffusion.Schedule.from_config({**config, "_class_name": cls.__name__})
  check(scheduler, 6, diffusion.make_sampler(schedule, 6))


@pytest.mark.parametrize("other", CLASSES)
@pytest.mark.parametrize("kind", CLASSES)
def test_another_sampler_on_the_checkpoints_schedule(kind, other):
  """The idiom `Other.from_config(pipe.scheduler.config)`: fields left out take the other one's defaults."""
  config = {**STABLE_DIFFUSION, "clip_sample": False, "skip_prk_steps": True}
  scheduler = CLASSES[other][0].from_config(CLASSES[kind][0].from_config(config).config)
  schedule = diffusion.Schedule.from_config({**config, "_class_name": CLASSES[kind][0].__name__})
  check(scheduler, 5, diffusion.make_sampler(schedule, 5, kind=other))


@pytest.mark.parametrize("change", [
  {}, dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"), dict(num_train_timesteps=333),
  dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02), dict(num_train_timesteps=50),
], ids=str)
def test_alphas_are_bit_equal(change):
  config = {**STABLE_DIFFUSION, **change}
  expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
  np.testing.assert_array_equal(diffusion.Schedule.from_config(config).alphas_cumprod, expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_gradient(kind):
  cls, extra = CLASSES[kind]
  scheduler = cls(**STABLE_DIFFUSION, **extra)
  scheduler.set_timesteps(7)
  noise = torch.from_numpy(NOISE).requires_grad_()
  theirs(scheduler, noise)[-1].square().mean().backward()
  sampler = diffusion.make_sampler(read(scheduler), 7)
  loss = lambda x: (diffusion.sample(lambda x, t: toy(jnp, x, t), x, sampler) ** 2).mean()
  ours = jax.jit(jax.grad(loss))(jnp.asarray(NOISE))
  np.testing.assert_allclose(ours, noise.grad, rtol=0, atol=1e-5 * noise.grad.abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_targets_and_x0(prediction):
  scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, prediction_type=prediction)
  schedule = read(scheduler)
  x0, noise = np.random.default_rng(1).standard_normal((2, 4, 2, 3, 2)).astype(np.float32)
  t = np.array([0, 10, 500, 999])
  args = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)
  noisy = diffusion.add_noise(schedule, x0, noise, t)
  np.testing.assert_allclose(noisy, scheduler.add_noise(*args), rtol=0, atol=1e-6)
  reference = diffusers.DDPMScheduler(**STABLE_DIFFUSION)
  expected = noise if prediction == "epsilon" else reference.get_velocity(*args)
  target = diffusion.training_target(schedule, x0, noise, t)
  np.testing.assert_allclose(target, expected, rtol=0, atol=1e-6)

  sampler = diffusion.make_sampler(schedule, 5)
  scheduler.set_timesteps(5)
  output = jnp.asarray(noise)
  for call, timestep in enumerate(scheduler.timesteps):
    step = scheduler.step(torch.from_numpy(noise), timestep, torch.from_numpy(x0))
    ours = sampler.predict_x0(lambda x, t: output, sampler.start(jnp.asarray(x0)), call)
    np.testing.assert_allclose(ours, step.pred_original_sample, rtol=1e-6, atol=1e-5)
