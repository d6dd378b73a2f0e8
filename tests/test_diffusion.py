"""Samplers against trajectories of `diffusers` (goldens/make_diffusion.py), and what they promise."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digzsl_jax import diffusion, samplers

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "diffusion.npz")
CLASS = {kind: cls for cls, kind in samplers.KINDS.items()}
STABLE_DIFFUSION = dict(
  beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
  set_alpha_to_one=False, skip_prk_steps=True)
NOISE = jnp.asarray(GOLDENS["noise"])
FRESH = jnp.asarray(GOLDENS["fresh"])
KINDS = tuple(CLASS)


def fresh(call):
  return FRESH[call]


def schedule(kind="ddim", **config):
  # Through JSON, as from a file: tuples, None and infinities must survive it.
  config = {"_class_name": CLASS[kind], **STABLE_DIFFUSION, **config}
  return diffusion.Schedule.from_config(json.loads(json.dumps(config)))


def toy(x_bhwz, t, gain=2.0):
  u = (t + 1) / 1000
  return u * x_bhwz + (1 - u) * jnp.tanh(gain * x_bhwz + 3 * u) / 2


@pytest.mark.parametrize("shape", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_golden_alphas(shape):
  ours = schedule(beta_schedule=shape).alphas_cumprod
  assert ours.dtype == np.float32
  np.testing.assert_array_equal(ours, GOLDENS[f"alphas_cumprod/{shape}"])


@pytest.mark.parametrize("name", [name[:-len("/latents")] for name in GOLDENS if name.endswith("/latents")])
def test_golden_trajectories(name):
  kind, prediction, spacing, steps = name.split("/")
  plan = schedule("ddim", prediction_type=prediction, timestep_spacing=spacing)
  sampler = diffusion.make_sampler(plan, int(steps), kind)
  expected = GOLDENS[f"{name}/latents"]
  if kind == "euler_karras":  # fractions that are found through float32 logarithms
    np.testing.assert_array_max_ulp(sampler.timesteps, GOLDENS[f"{name}/timesteps"], 2)
  else:
    np.testing.assert_array_equal(sampler.timesteps, GOLDENS[f"{name}/timesteps"])
  assert sampler.timesteps.dtype == GOLDENS[f"{name}/timesteps"].dtype
  assert sampler.calls == int(steps) + (kind == "pndm")
  assert sampler.stochastic == (kind in ("dpm++_sde_karras", "euler_ancestral", "lcm") and int(steps) > 1)

  unit = np.ones(sampler.calls + 1) if sampler.scale is None else np.append(sampler.scale, 1)  # as the denoiser sees it
  with jax.disable_jit():
    carry = sampler.start(NOISE)
    np.testing.assert_allclose(carry.x_bhwz * unit[0], expected[0] * unit[0], rtol=0, atol=1e-6)
    for call in range(sampler.calls):
      carry = sampler.run(toy, carry, call, call + 1, fresh)
      size = unit[call + 1]
      np.testing.assert_allclose(carry.x_bhwz * size, expected[call + 1] * size, rtol=0, atol=1e-5)
  last = jax.jit(lambda noise: diffusion.sample(toy, noise, sampler, fresh))(NOISE)
  np.testing.assert_allclose(last, expected[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_calls_compose(kind):
  sampler = diffusion.make_sampler(schedule(kind), 6)
  run = jax.jit(lambda carry, start, stop: sampler.run(toy, carry, start, stop, fresh), static_argnums=(1, 2))
  whole = run(sampler.start(NOISE), 0, sampler.calls)
  for cut in (0, 1, 3, sampler.calls - 1):
    parts = run(run(sampler.start(NOISE), 0, cut), cut, sampler.calls)
    atol = 1e-6 if 1 in (cut, sampler.calls - cut) else 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), parts, whole)
  with pytest.raises(ValueError, match="outside of this sampler's"):
    sampler.run(toy, sampler.start(NOISE), 0, sampler.calls + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_of_the_carry_leads_with_the_batch(kind):
  sampler = diffusion.make_sampler(schedule(kind), 6)
  carry = sampler.run(toy, sampler.start(NOISE), 0, 4, fresh)
  assert all(leaf.shape[0] == len(NOISE) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(carry))
  backwards = lambda call: fresh(call)[::-1]
  swapped = sampler.run(toy, jax.tree.map(lambda leaf: leaf[::-1], carry), 4, sampler.calls, backwards)
  straight = sampler.run(toy, carry, 4, sampler.calls, fresh)
  np.testing.assert_allclose(swapped.x_bhwz[::-1], straight.x_bhwz, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_last_calls(kind):
  sampler = diffusion.make_sampler(schedule(kind), 6)
  cut = sampler.calls - 2
  prefix = sampler.run(toy, sampler.start(NOISE), 0, cut, fresh)

  def suffix(gain):
    return (sampler.run(lambda x, t: toy(x, t, gain), prefix, cut, sampler.calls, fresh).x_bhwz ** 2).sum()

  def whole(gain):  # every call, but only the last two see the gain as a variable
    last = lambda t: jnp.where(t <= sampler.timesteps[cut], gain, jax.lax.stop_gradient(gain))
    return (diffusion.sample(lambda x, t: toy(x, t, last(t)), NOISE, sampler, fresh) ** 2).sum()

  gradient = jax.grad(suffix)(2.0)
  assert abs(gradient) > 1e-3
  np.testing.assert_allclose(gradient, jax.grad(whole)(2.0), rtol=1e-5)


@pytest.mark.parametrize("kind,prediction", [
  ("ddim", "epsilon"), ("ddim", "v_prediction"), ("pndm", "epsilon"), ("dpm++", "epsilon"),
  ("dpm++", "v_prediction"), ("euler", "epsilon"), ("euler", "v_prediction")])
def test_a_perfect_denoiser_is_followed_exactly(kind, prediction):
  """With the true noise, each latent is the forward process at its timestep, and x0 predictions are x0."""
  plan = schedule(kind, prediction_type=prediction, timestep_spacing="leading")
  sampler = diffusion.make_sampler(plan, 8)
  x0 = jax.random.normal(jax.random.key(0), NOISE.shape)
  level = lambda t: jnp.full((len(NOISE),), int(t))
  denoise = lambda x, t: diffusion.training_target(plan, x0, NOISE, level(t))
  carry = sampler.start(NOISE, x0)
  with jax.disable_jit():
    for call, t in enumerate(sampler.timesteps):
      noisy = diffusion.add_noise(plan, x0, NOISE, level(t))
      scale = 1 if sampler.scale is None else sampler.scale[call]
      np.testing.assert_allclose(scale * carry.x_bhwz, noisy, rtol=0, atol=1e-5)
      np.testing.assert_allclose(sampler.predict_x0(denoise, carry, call), x0, rtol=0, atol=1e-5)
      carry = sampler.run(denoise, carry, call, call + 1)


@pytest.mark.parametrize("kind,eta", [
  ("ddim", 0.4), ("ddim", 1.0), ("euler_ancestral", 0), ("dpm++_sde", 0), ("lcm", 0)])
def test_old_and_new_noise_add_up_to_the_next_level(kind, eta):
  plan = schedule(timestep_spacing="leading")
  sampler = diffusion.make_sampler(plan, 10, kind, eta=eta)
  then = diffusion.make_sampler(plan, 10, kind, eta=eta, strength=0.9)  # begins at call 1
  assert then.timesteps.tolist() == sampler.timesteps[1:].tolist()
  denoise = lambda x, t: NOISE
  carry = sampler.start(NOISE, jnp.zeros_like(NOISE))
  old = sampler.run(denoise, carry, 0, 1, lambda call: jnp.zeros_like(NOISE)).x_bhwz
  new = sampler.run(denoise, carry, 0, 1, lambda call: FRESH[0]).x_bhwz - old
  np.testing.assert_allclose(new, sampler.noise[0] * FRESH[0], rtol=0, atol=2e-6)
  share = (old / NOISE).mean()
  np.testing.assert_allclose(old, share * NOISE, rtol=0, atol=1e-5)
  assert sampler.noise[0] > 0.1 and (share > 0.1 or kind == "lcm")
  np.testing.assert_allclose(share**2 + sampler.noise[0] ** 2, then.first[1] ** 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["euler_ancestral", "lcm", "dpm++_sde"])
def test_new_noise_is_asked_for_by_number_of_call(kind):
  sampler, asked = diffusion.make_sampler(schedule(), 4, kind), []
  assert sampler.stochastic
  with jax.disable_jit():
    carry = sampler.run(toy, sampler.start(NOISE), 0, 2, lambda call: asked.append(int(call)) or FRESH[call])
    sampler.run(toy, carry, 2, 4, lambda call: asked.append(int(call)) or FRESH[call])
  assert asked == [0, 1, 2, 3]
  with pytest.raises(ValueError, match="pass fresh"):
    diffusion.sample(toy, NOISE, sampler)


@pytest.mark.parametrize("kind", ["ddim", "pndm", "dpm++", "dpm++_karras", "euler", "euler_karras"])
def test_deterministic_samplers_ask_for_no_noise(kind):
  sampler = diffusion.make_sampler(schedule(), 3, kind)
  assert not sampler.stochastic
  with jax.disable_jit():
    diffusion.sample(toy, NOISE, sampler, fresh=lambda call: pytest.fail("asked for noise"))


@pytest.mark.parametrize("kind,same", [
  ("ddim", True), ("euler", True), ("lcm", True), ("dpm++", False), ("pndm", False)])
def test_starts_in_the_middle(kind, same):
  """Only multistep samplers make other calls than those that the whole sampler ends with."""
  plan = schedule(kind, timestep_spacing="leading")
  whole, part = (diffusion.make_sampler(plan, 10, strength=strength) for strength in (1.0, 0.35))
  assert part.calls == (4 if kind == "pndm" else 3)
  np.testing.assert_array_equal(part.timesteps, whole.timesteps[-part.calls:])
  assert np.array_equal(part.weights, whole.weights[-part.calls:]) == same
  with pytest.raises(ValueError, match="x0_bhwz"):
    part.start(NOISE)
  x0 = 0.5 * NOISE[::-1]
  noisy = diffusion.add_noise(plan, x0, NOISE, jnp.full((len(NOISE),), int(part.timesteps[0])))
  scale = 1 if part.scale is None else part.scale[0]
  np.testing.assert_allclose(scale * part.start(NOISE, x0).x_bhwz, noisy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddim", "dpm++", "euler", "euler_ancestral", "lcm"])
def test_a_rescaled_schedule_begins_with_noise_alone(kind):
  plan = schedule(kind, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
  assert plan.alphas_cumprod[-1] == 0 and np.all(np.diff(plan.alphas_cumprod) < 0)
  np.testing.assert_allclose(plan.alphas_cumprod[0], schedule(kind).alphas_cumprod[0], rtol=1e-6)
  sampler = diffusion.make_sampler(plan, 4)
  assert sampler.timesteps[0] == 999
  x0 = jax.random.normal(jax.random.key(0), NOISE.shape)
  signal = sampler.first[0] * (1 if sampler.scale is None else sampler.scale[0])
  assert signal < 3e-4  # not quite none where sigma has to be finite
  denoise = lambda x, t: -x0  # v where nothing is left of x0
  np.testing.assert_allclose(sampler.predict_x0(denoise, sampler.start(NOISE), 0), x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_explicit_timesteps_end_at_a_noise_level(prediction):
  plan = schedule("pndm", prediction_type=prediction)
  sampler = diffusion.make_sampler(plan, None, kind="ddim", timesteps=[999, 830, 500])
  x0 = jax.random.normal(jax.random.key(0), NOISE.shape)
  level = lambda t: jnp.full((len(NOISE),), t)
  denoise = lambda x, t: diffusion.training_target(plan, x0, NOISE, level(t))
  carry = sampler.start(diffusion.add_noise(plan, x0, NOISE, level(999)))
  carry = sampler.run(denoise, carry, 0, sampler.calls - 1)
  noisy = diffusion.add_noise(plan, x0, NOISE, level(500))
  np.testing.assert_allclose(carry.x_bhwz, noisy, rtol=0, atol=1e-5)

  ours = sampler.predict_x0(toy, carry, sampler.calls - 1)
  alpha, output = plan.alphas_cumprod[500], toy(carry.x_bhwz, 500)
  if prediction == "epsilon":
    expected = (carry.x_bhwz - (1 - alpha) ** 0.5 * output) / alpha**0.5
  else:
    expected = alpha**0.5 * carry.x_bhwz - (1 - alpha) ** 0.5 * output
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def unet(x_bhwz, t_b, text_bld):
  shift_b = jnp.tanh(text_bld.sum((1, 2)) + t_b / 1000)
  return jnp.sin(x_bhwz + shift_b[:, None, None, None])


def test_both_forms_of_guidance_agree():
  text = jax.random.normal(jax.random.key(0), (2, 3, 4))
  null = jax.random.normal(jax.random.key(1), (1, 3, 4))
  level = jnp.full((2,), 400)

  @functools.partial(jax.jit, static_argnums=3)
  def guided(x, text, scale, stop):  # values, and gradients of their sum
    loss = lambda x, text: diffusion.guide(unet, text, null, scale, stop)(x, jnp.int32(400))
    return loss(x, text), jax.grad(lambda *a: loss(*a).sum(), (0, 1))(x, text)

  cond, uncond = unet(NOISE, level, text), unet(NOISE, level, jnp.repeat(null, 2, 0))
  for scale in (1.0, 7.5):
    (both, both_grads), (one, one_grads) = (guided(NOISE, text, scale, stop) for stop in (False, True))
    np.testing.assert_allclose(both, uncond + scale * (cond - uncond), rtol=0, atol=2e-6)
    np.testing.assert_allclose(one, both, rtol=0, atol=2e-6)
    # Through one call the prompt's gradient is exact, and the latent's is that of the conditional half.
    np.testing.assert_allclose(both_grads[1], one_grads[1], rtol=1e-5)
    assert np.abs(both_grads[0] - one_grads[0]).max() > 0.1 or scale == 1
    conditional = jax.grad(lambda x, scale=scale: scale * unet(x, level, text).sum())(NOISE)
    np.testing.assert_allclose(one_grads[0], conditional, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [False, True])
def test_guidance_rescale(stop):
  """At 1 each row has the standard deviation of its conditional half, at 0 nothing changes; between, a mixture."""
  text, null = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.zeros((1, 3, 4))
  outputs = [diffusion.guide(unet, text, null, 7.5, stop, rescale)(NOISE, jnp.int32(400)) for rescale in (0, 1, 0.7)]
  cond = unet(NOISE, jnp.full((2,), 400), text)
  plain, whole, mixed = (np.asarray(output) for output in outputs)
  np.testing.assert_allclose(whole.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-5)
  assert np.abs(plain.std((1, 2, 3)) / cond.std((1, 2, 3)) - 1).min() > 0.05
  np.testing.assert_allclose(mixed, 0.7 * whole + 0.3 * plain, rtol=0, atol=1e-6)
  off = jax.make_jaxpr(diffusion.guide(unet, text, null, 7.5, stop))(NOISE, jnp.int32(400))
  zero = jax.make_jaxpr(diffusion.guide(unet, text, null, 7.5, stop, 0.0))(NOISE, jnp.int32(400))
  assert str(off) == str(zero) and "sqrt" not in str(off)


def test_batches_of_guidance():
  text, null, rows = jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4)), []
  counted = lambda x, t_b, text: rows.append(len(x)) or unet(x, t_b, text)
  for scale, stop, expected in ((7.5, False, [4]), (7.5, True, [2, 2]), (1.0, False, [2])):
    rows.clear()
    diffusion.guide(counted, text, null, scale, stop)(NOISE, 7)
    assert rows == expected


def test_guidance_scale_and_time_are_traced():
  sampler, traces = diffusion.make_sampler(schedule("pndm"), 6), []
  text, null = jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))
  counted = lambda x, t_b, text: traces.append(1) or unet(x, t_b, text)
  draw = jax.jit(lambda scale: diffusion.sample(diffusion.guide(counted, text, null, scale), NOISE, sampler))
  results = [draw(scale) for scale in (1.0, 3.0, 7.5)]
  assert len(traces) == 1
  assert np.abs(results[0] - results[2]).max() > 1e-2


def test_low_precision_denoiser():
  sampler = diffusion.make_sampler(schedule("dpm++"), 4)
  low = lambda x, t: toy(x, t).astype(jnp.bfloat16)
  x_bhwz = diffusion.sample(low, NOISE.astype(jnp.bfloat16), sampler)
  assert x_bhwz.dtype == jnp.float32


def test_trailing_spacing_never_leaves_the_schedule():
  # 1000 / 61 rounds so that a plain float range has 62 points, the last one at timestep -1.
  sampler = diffusion.make_sampler(schedule(timestep_spacing="trailing"), 61)
  assert sampler.calls == 61 and sampler.timesteps[0] == 999 and sampler.timesteps[-1] >= 0


@pytest.mark.parametrize("kind,config,field", [
  ("ddim", dict(clip_sample=True), "clip_sample=True"), ("ddim", dict(thresholding=True), "thresholding"),
  ("dpm++", dict(thresholding=True), "thresholding"), ("pndm", dict(skip_prk_steps=False), "skip_prk_steps"),
  ("lcm", dict(clip_sample=True), "clip_sample=True"), ("lcm", dict(thresholding=True), "thresholding"),
  ("dpm++", dict(use_exponential_sigmas=True), "use_exponential_sigmas"),
  ("dpm++", dict(solver_order=3), "solver_order"),
  ("dpm++", dict(algorithm_type="dpmsolver"), "algorithm_type='dpmsolver'"),
  ("dpm++", dict(final_sigmas_type="half"), "final_sigmas_type"),
  ("euler", dict(final_sigmas_type="half"), "final_sigmas_type"),
  ("euler", dict(interpolation_type="log_linear"), "interpolation_type"),
  ("euler", dict(timestep_type="continuous"), "timestep_type"),
  ("euler", dict(use_beta_sigmas=True), "use_beta_sigmas"),
  ("euler", dict(use_exponential_sigmas=True), "use_exponential_sigmas"),
  ("lcm", dict(original_inference_steps=2000), "original_inference_steps=2000"),
  ("pndm", dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
  ("ddim", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "rescale_betas_zero_snr.*999"),
  ("lcm", dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr.*prediction_type"),
  ("ddim", dict(prediction_type="sample"), "prediction_type"),
  ("ddim", dict(beta_schedule="exp"), "beta_schedule"),
  ("ddim", dict(timestep_spacing="even"), "timestep_spacing"),
  ("ddim", dict(trained_betas=[0.1, 0.2]), "trained_betas"),
  ("ddim", dict(_class_name="Euler"), "_class_name"),
])
def test_unsupported_fields_are_named(kind, config, field):
  with pytest.raises(ValueError, match=field):
    diffusion.make_sampler(schedule(kind, **config), 5)


def test_fields_left_out_mean_what_their_class_means():
  """An absent field of DDIM and PNDM files has a default that is not supported; other files say nothing."""
  for cls, field in (("DDIMScheduler", "clip_sample"), ("PNDMScheduler", "skip_prk_steps")):
    plan = diffusion.Schedule.from_config({"_class_name": cls})
    with pytest.raises(ValueError, match=field):
      diffusion.make_sampler(plan, 5)
    for other in set(KINDS) - {plan.kind}:
      diffusion.make_sampler(plan, 5, kind=other)
  euler = diffusion.Schedule.from_config({"_class_name": "EulerDiscreteScheduler"})
  assert diffusion.make_sampler(euler, 5, kind="ddim").calls == 5


@pytest.mark.parametrize("arguments,message", [
  (dict(steps=0), "steps=0"), (dict(steps=1001), "steps=1001"), (dict(steps=None), "steps=None"),
  (dict(steps=1000), "steps=1000"),  # with steps_offset 1 this begins at timestep 1000
  (dict(steps=5, kind="heun"), "sampler='heun'"), (dict(steps=1000, kind="dpm++"), "steps=1000"),
  (dict(steps=None, timesteps=[9, 5], kind="pndm"), "kind='ddim'"),
  (dict(steps=3, timesteps=[9, 5]), "steps=3"), (dict(steps=None, timesteps=[5, 9]), "descending"),
  (dict(steps=None, timesteps=[1000, 9]), "between 999 and 0"),
  (dict(steps=None, timesteps=[]), "explicit list"),
  (dict(steps=51, kind="lcm"), "steps=51.*original_inference_steps=50"), (dict(steps=None, kind="lcm"), "steps=None"),
  (dict(steps=5, strength=0), "strength=0 "), (dict(steps=5, strength=1.1), "strength=1.1"),
  (dict(steps=5, strength=0.1), "strength=0.1.*steps=5"), (dict(steps=5, kind="dpm++", eta=0.5), "eta=0.5"),
])
def test_impossible_plans(arguments, message):
  with pytest.raises(ValueError, match=message):
    diffusion.make_sampler(schedule(), **arguments)
