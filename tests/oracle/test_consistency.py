"""The loss of latent consistency distillation and its gradient, against the schedulers of `diffusers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax import consistency, diffusion

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ROWS, TEXT, GUIDANCE = 7, 3, 4.0


def toy(np_like, weight, x, t, text):
  """A nonlinear denoiser of one weight that reads its prompt; `t` and `text` are `[b, 1, 1, 1]`."""
  u = (t + 1) / 1000
  return u * x + (1 - u) * np_like.tanh(weight * x + text)


class Denoiser(nnx.Module):
  def __init__(self, weight):
    self.weight = nnx.Param(jnp.float32(weight))

  def __call__(self, x_bhwz, t_b, text_bld):
    return toy(jnp, self.weight[...], x_bhwz, t_b[:, None, None, None], text_bld.mean((1, 2))[:, None, None, None])


class Tower(nnx.Module):
  def __init__(self):
    self.table = nnx.Param(jnp.linspace(-1, 1, 20).reshape(10, 2))

  def __call__(self, ids_bl):
    return self.table[...][ids_bl], {}


def theirs(prediction, skip, latents, noise, n_b, text, null, start, teacher):
  """The published loss row by row: boundary form of `LCMScheduler`, solver of `DDIMScheduler`."""
  lcm = diffusers.LCMScheduler(**SCHEDULE, prediction_type=prediction)
  ddim = diffusers.DDIMScheduler(**SCHEDULE, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
  lcm.set_timesteps(50)
  ddim.set_timesteps(50 // skip)  # whose steps are `skip` times as long
  weight = torch.tensor(start, requires_grad=True)

  def jump(x, t, text):
    output = toy(torch, weight, x, torch.tensor(float(t)), text)
    alpha = ddim.alphas_cumprod[t]
    if prediction == "epsilon":
      x0 = (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
    else:
      x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * output
    skip, out = lcm.get_scalings_for_boundary_condition_discrete(t)
    return skip * x + out * x0

  errors = []
  for row, n in enumerate(n_b):
    t = int(lcm.timesteps[n])
    after = max(t - 20 * skip, 0)
    x = ddim.add_noise(latents[row], noise[row], torch.tensor(t))
    at = torch.tensor(float(t))
    unconditional, guided = (toy(torch, torch.tensor(teacher), x, at, words) for words in (null, text[row]))
    guided = unconditional + GUIDANCE * (guided - unconditional)
    moved = ddim.step(guided, t, x).prev_sample
    with torch.no_grad():
      target = jump(moved, after, text[row])
    errors.append(jump(x, t, text[row]) - target)
  loss = (torch.stack(errors).square() + 1e-3**2).sqrt().sub(1e-3).mean()
  loss.backward()
  return loss.item(), weight.grad.item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("seed, skip", [(0, 1), (1, 5)])
def test_loss_and_gradient(prediction, seed, skip):
  rng = np.random.default_rng(seed)
  latents = rng.normal(size=(ROWS, 2, 3, 4)).astype(np.float32)
  ids_bl, null_l, key = rng.integers(10, size=(ROWS, TEXT)), np.zeros(TEXT, int), jax.random.key(seed)
  time_key, noise_key = jax.random.split(key)
  noise = np.array(jax.random.normal(noise_key, latents.shape))
  n_b = np.floor(50 * (np.arange(ROWS) + np.asarray(jax.random.uniform(time_key, (ROWS,)))) / ROWS).astype(int)
  table = np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2)
  expected = theirs(prediction, skip, *map(torch.from_numpy, (latents, noise)), n_b,
                    torch.from_numpy(table[ids_bl].mean((1, 2))), torch.tensor(table[null_l].mean()), 1.5, 2.0)

  schedule = diffusion.Schedule.from_config(SCHEDULE | {"prediction_type": prediction})
  (text, text_params), (denoiser, teacher) = nnx.split(Tower()), nnx.split(Denoiser(2.0))

  def ours(student):
    frozen = text_params, teacher, jnp.asarray(null_l)
    return consistency.loss(schedule, skip, GUIDANCE, text, denoiser, nnx.merge(denoiser, student), frozen,
                            (jnp.asarray(latents), jnp.asarray(ids_bl)), key)[0]

  value, slope = jax.jit(jax.value_and_grad(ours))(nnx.state(Denoiser(1.5)))
  np.testing.assert_allclose(value, expected[0], rtol=1e-5)
  np.testing.assert_allclose(slope["weight"][...], expected[1], rtol=1e-4)
