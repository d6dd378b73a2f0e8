"""Schedules and samplers against `diffusers`: every timestep and every intermediate latent."""

import importlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax import diffusion

DPM, EULER, KARRAS, SDE = (diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler,
                           dict(use_karras_sigmas=True), dict(algorithm_type="sde-dpmsolver++"))
CLASSES = {
  "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False)),
  "pndm": (diffusers.PNDMScheduler, dict(skip_prk_steps=True)),
  "dpm++": (DPM, {}),
  "euler": (EULER, {}),
  "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
  "lcm": (diffusers.LCMScheduler, {}),
}
VARIANTS = {"dpm++_karras": (DPM, KARRAS), "dpm++_sde": (DPM, SDE), "dpm++_sde_karras": (DPM, KARRAS | SDE),
            "euler_karras": (EULER, KARRAS)}
ALL = CLASSES | VARIANTS
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
NOISE = np.random.default_rng(0).standard_normal((2, 2, 3, 2)).astype(np.float32)
PICTURE = np.random.default_rng(1).standard_normal((2, 2, 3, 2)).astype(np.float32)
FRESH = np.random.default_rng(2).standard_normal((50, 2, 2, 3, 2)).astype(np.float32)  # one for each call


def toy(np_like, x, t):
  """A nonlinear denoiser under which latents stay of order 1, for either meaning of its output."""
  u = (t + 1) / 1000
  return u * x + (1 - u) * np_like.tanh(2 * x + 3 * u) / 2


def read(scheduler):
  """The schedule of the file that `scheduler` writes."""
  return diffusion.Schedule.from_config(json.loads(scheduler.to_json_string()))


def theirs(scheduler, latent, timesteps, **settings):
  """Latents from `latent` on, with `FRESH` in the place of what the scheduler would draw."""
  latents, fresh = [latent], iter(torch.from_numpy(FRESH).to(latent.dtype))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(importlib.import_module(type(scheduler).__module__), "randn_tensor",
                  lambda *arguments, **named: next(fresh), raising=False)
    for t in timesteps:
      output = toy(torch, scheduler.scale_model_input(latents[-1], t), t.float())
      latents.append(scheduler.step(output, t, latents[-1], **settings).prev_sample)
  return latents


def units(scheduler, calls):
  """What turns each latent into what the denoiser sees: Euler's are up to 4096 times as large."""
  if "Euler" not in type(scheduler).__name__:
    return np.ones(calls + 1)
  return 1 / np.sqrt(1 + scheduler.sigmas.numpy()[-calls - 1:].astype(np.float64) ** 2)


def check(scheduler, steps, sampler, strength=1.0, exact=False, **settings):
  """Compares timesteps and all latents, from noise or, with `strength`, from a picture."""
  scheduler.set_timesteps(steps)
  begin = steps - min(int(steps * strength), steps)  # StableDiffusionImg2ImgPipeline.get_timesteps
  timesteps, noise = scheduler.timesteps[begin:], torch.from_numpy(NOISE)
  if hasattr(scheduler, "set_begin_index"):
    scheduler.set_begin_index(begin)
  if exact:
    scheduler.sigmas, noise = scheduler.sigmas.double(), noise.double()
  if strength < 1:
    first = scheduler.add_noise(torch.from_numpy(PICTURE), noise, timesteps[:1].repeat(len(NOISE)))
    carry = sampler.start(jnp.asarray(NOISE), jnp.asarray(PICTURE))
  else:
    first, carry = noise * scheduler.init_noise_sigma, sampler.start(jnp.asarray(NOISE))
  expected = theirs(scheduler, first, timesteps, **settings)
  assert expected[-1].abs().max() < 20
  seen, carries = [], [carry]

  def denoise(x_bhwz, t):
    seen.append(t.item())
    return toy(np, np.asarray(x_bhwz), np.float32(t))

  with jax.disable_jit():  # nothing to compile, and `t` is concrete
    for call in range(sampler.calls):
      carries.append(sampler.run(denoise, carries[-1], call, call + 1, lambda call: FRESH[int(call)]))
  assert seen == sampler.timesteps.tolist()
  if sampler.timesteps.dtype == np.float32 and scheduler.config.get("use_karras_sigmas"):
    # PyTorch's square root is off by one bit at times, and so is then a timestep that is found by its sigma.
    np.testing.assert_array_max_ulp(sampler.timesteps, timesteps.numpy(), 2)
  else:
    assert seen == timesteps.tolist()
  unit = units(scheduler, sampler.calls)[:, None, None, None, None]
  ours, expected = np.stack([carry.x_bhwz for carry in carries]) * unit, np.stack(expected) * unit
  print(f"trajectory: {np.abs(ours - expected).max():.1e} of {np.abs(ours).max():.1f}")
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ALL)
def test_trajectories(kind, prediction, spacing):
  cls, extra = ALL[kind]
  scheduler = cls(**STABLE_DIFFUSION, **extra, prediction_type=prediction, timestep_spacing=spacing)
  schedule = read(scheduler)
  assert schedule.kind == kind.partition("_")[0] or kind in CLASSES
  for steps in (1, 2, 3, 4, 5, 7, 12, 30, 50) if kind in CLASSES else (1, 2, 3, 5, 25):
    check(scheduler, steps, diffusion.make_sampler(schedule, steps))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ALL)
def test_starts_in_the_middle(kind, prediction):
  """Image-to-image; 50 * 0.58 is 28.999..., and PNDM meets its repeated timestep before, at or after its start."""
  cls, extra = ALL[kind]
  scheduler = cls(**STABLE_DIFFUSION, **extra, prediction_type=prediction)
  schedule = read(scheduler)
  for steps, strength in ((1, 0.999999), (2, 0.5), (3, 0.7), (5, 0.8), (5, 0.61), (7, 0.99), (12, 0.17), (17, 0.77),
                          (20, 0.3), (50, 0.58)):
    if int(steps * strength):
      check(scheduler, steps, diffusion.make_sampler(schedule, steps, strength=strength), strength)
    else:
      with pytest.raises(ValueError, match=f"strength={strength}"):
        diffusion.make_sampler(schedule, steps, strength=strength)


@pytest.fixture
def double(monkeypatch):
  """Has an Euler scheduler compute in float64: in float32 its latents lose four digits where sigma is 4096 or more."""
  def patch(cls):
    if "Euler" not in cls.__name__:
      return False
    names = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(importlib.import_module(cls.__module__), "torch", names)
    return True
  return patch


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "pndm"])
def test_schedules_rescaled_to_end_without_signal(kind, spacing, double):
  cls, extra = ALL[kind]
  scheduler = cls(**STABLE_DIFFUSION, **extra, prediction_type="v_prediction", timestep_spacing=spacing,
                  rescale_betas_zero_snr=True)
  schedule, exact = read(scheduler), double(cls)
  assert schedule.alphas_cumprod[-1] == 0
  for steps, strength in ((1, 1), (2, 1), (5, 1), (12, 1), (30, 1), (13, 0.77)):
    check(scheduler, steps, diffusion.make_sampler(schedule, steps, strength=strength), strength, exact)


ENDS = [dict(final_sigmas_type="sigma_min", lower_order_final=lower, euler_at_final=euler)
        for lower in (True, False) for euler in (True, False)]
SETTINGS = {
  "shown to all": (ALL, [dict(steps_offset=0), dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"),
                         dict(num_train_timesteps=200, trained_betas=np.linspace(0.001, 0.05, 200).tolist())]),
  "last level": (("ddim", "pndm", "lcm"), [dict(set_alpha_to_one=True), dict(set_alpha_to_one=False)]),
  "last sigma": (("dpm++", "dpm++_sde_karras", "euler", "euler_karras", "euler_ancestral"), ENDS),
  "order": (("dpm++",), [dict(euler_at_final=True), dict(lower_order_final=False)]),
  "sigmas": (("euler", "euler_karras"), [dict(sigma_min=0.1), dict(sigma_max=5.0)]),
  "distilled": (("lcm",), [dict(original_inference_steps=20, timestep_scaling=0.003)]),
}


@pytest.mark.parametrize("kind, change", [(kind, change) for kinds, changes in SETTINGS.values() for kind in kinds
                                          for change in changes], ids=lambda value: str(value)[:60])
def test_settings(kind, change, double):
  cls, extra = ALL[kind]
  config = {**STABLE_DIFFUSION, **extra, "prediction_type": "v_prediction", **change}
  scheduler = cls.from_config(config)
  schedule = diffusion.Schedule.from_config({**config, "_class_name": cls.__name__})
  exact = "squaredcos_cap_v2" in change.values() and double(cls)
  for steps in (6, 16) if "final_sigmas_type" in change else (6,):
    check(scheduler, steps, diffusion.make_sampler(schedule, steps), exact=exact)


@pytest.mark.parametrize("other", ALL)
@pytest.mark.parametrize("kind", CLASSES)
def test_another_sampler_on_the_checkpoints_schedule(kind, other):
  """The idiom `Other.from_config(pipe.scheduler.config)`: fields left out take the other one's defaults."""
  config = {**STABLE_DIFFUSION, "clip_sample": False, "skip_prk_steps": True}
  given = CLASSES[kind][0].from_config(config).config
  scheduler = ALL[other][0].from_config(given, **(ALL[other][1] if other in VARIANTS else {}))
  schedule = diffusion.Schedule.from_config({**config, "_class_name": CLASSES[kind][0].__name__})
  check(scheduler, 5, diffusion.make_sampler(schedule, 5, kind=other))


def test_fields_of_the_checkpoints_sampler_reach_another():
  config = {**STABLE_DIFFUSION, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.05,
            "clip_sample": False}
  given = EULER.from_config(config).config
  schedule = diffusion.Schedule.from_config({**config, "_class_name": "EulerDiscreteScheduler"})
  for kind in ("dpm++", "euler_ancestral", "ddim", "lcm"):
    check(CLASSES[kind][0].from_config(given), 6, diffusion.make_sampler(schedule, 6, kind=kind))


TURBO = dict(STABLE_DIFFUSION, num_train_timesteps=1000, trained_betas=None, clip_sample=False, skip_prk_steps=True,
             set_alpha_to_one=False, timestep_spacing="trailing", prediction_type="epsilon", use_karras_sigmas=False,
             interpolation_type="linear", sigma_min=None, sigma_max=None, timestep_type="discrete",
             sample_max_value=1.0, rescale_betas_zero_snr=False)


@pytest.mark.parametrize("cls", [EULER, diffusers.EulerAncestralDiscreteScheduler, diffusers.LCMScheduler])
def test_few_steps_of_distilled_checkpoints(cls):
  """Stable Diffusion Turbo's own scheduler, and what else is run for so few steps."""
  scheduler = cls.from_config(TURBO)
  for steps in (1, 2, 3, 4, 8):
    check(scheduler, steps, diffusion.make_sampler(read(scheduler), steps))
    if steps > 1:
      check(scheduler, steps, diffusion.make_sampler(read(scheduler), steps, strength=0.51), strength=0.51)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_with_new_noise(prediction, eta):
  for one in (True, False):
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, prediction_type=prediction,
                                        set_alpha_to_one=one)
    for steps in (1, 4, 25):
      check(scheduler, steps, diffusion.make_sampler(read(scheduler), steps, eta=eta), eta=eta)


def test_guidance_rescale():
  from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
  rng = np.random.default_rng(3)
  both = rng.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)  # unconditional, conditional
  unet = lambda x, t, text: jnp.asarray(both)[text[:, 0, 0].astype(int), text[:, 0, 1].astype(int)]
  text_bld, null_bld = (jnp.stack([jnp.full((3, 1), half), jnp.arange(3)[:, None]], -1) for half in (1, 0))
  null, text = torch.from_numpy(both)
  for rescale in (0.0, 0.3, 0.7, 1.0):
    guided = null + 7.5 * (text - null)
    expected = rescale_noise_cfg(guided, text, rescale) if rescale else guided
    for stop in (False, True):
      ours = diffusion.guide(unet, text_bld, null_bld, 7.5, stop, rescale)(jnp.zeros(both.shape[1:]), 0)
      np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [
  {}, dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"), dict(num_train_timesteps=333),
  dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02), dict(num_train_timesteps=50),
], ids=str)
def test_alphas_are_bit_equal(change):
  config = {**STABLE_DIFFUSION, **change}
  expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
  np.testing.assert_array_equal(diffusion.Schedule.from_config(config).alphas_cumprod, expected)


@pytest.mark.parametrize("change", [{}, dict(beta_schedule="linear"), dict(num_train_timesteps=333)], ids=str)
def test_rescaled_alphas(change):
  config = {**STABLE_DIFFUSION, **change, "rescale_betas_zero_snr": True}
  expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
  ours = diffusion.Schedule.from_config(config).alphas_cumprod
  assert ours[-1] == expected[-1] == 0
  np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-7)  # PyTorch's square root is off by one bit at times


def test_a_file_of_lcm_may_leave_its_schedule_out():
  expected = diffusers.LCMScheduler().alphas_cumprod.numpy()
  ours = diffusion.Schedule.from_config({"_class_name": "LCMScheduler"}).alphas_cumprod
  np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_gradient(kind):
  cls, extra = CLASSES[kind]
  scheduler = cls(**STABLE_DIFFUSION, **extra)
  steps = 2 if kind == "lcm" else 7  # new noise makes LCM forget its first
  scheduler.set_timesteps(steps)
  noise = torch.from_numpy(NOISE).requires_grad_()
  theirs(scheduler, noise * scheduler.init_noise_sigma, scheduler.timesteps)[-1].square().mean().backward()
  sampler = diffusion.make_sampler(read(scheduler), steps)
  fresh = lambda call: jnp.asarray(FRESH)[call]
  loss = lambda x: (diffusion.sample(lambda x, t: toy(jnp, x, t), x, sampler, fresh) ** 2).mean()
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["euler", "euler_ancestral", "lcm"])
def test_x0_of_scaled_latents_and_of_consistency(kind, prediction):
  scheduler = CLASSES[kind][0](**STABLE_DIFFUSION, prediction_type=prediction)
  scheduler.set_timesteps(5)
  sampler = diffusion.make_sampler(read(scheduler), 5)
  carry = sampler.start(jnp.asarray(NOISE))
  for call, timestep in enumerate(scheduler.timesteps):
    latent = torch.from_numpy(np.asarray(carry.x_bhwz))
    step = scheduler.step(toy(torch, scheduler.scale_model_input(latent, timestep), timestep.float()), timestep, latent)
    ours = sampler.predict_x0(lambda x, t: toy(jnp, x, t), carry, call)
    expected = step.denoised if kind == "lcm" else step.pred_original_sample
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    carry = sampler.run(lambda x, t: toy(jnp, x, t), carry, call, call + 1, lambda call: jnp.asarray(FRESH)[call])
