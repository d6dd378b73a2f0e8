"""Noise schedules, samplers and guidance over one function, `denoise(x_bhwz, t) -> output_bhwz`.

A latent at timestep t is x = sqrt(alpha) x0 + sqrt(1 - alpha) noise, alpha falling with t. The network's
output is the noise ("epsilon") or v = sqrt(alpha) noise - sqrt(1 - alpha) x0 ("v_prediction", Salimans & Ho,
arXiv 2202.00512). For either, x0 and noise are weighted sums of x and output, and so is every step of
- DDIM (Song et al., arXiv 2010.02502, eq. 12): predict both, mix them again at the next level;
- Euler (Karras et al., arXiv 2206.00364, algorithm 1 without its correction): the same, on latents divided by
  sqrt(alpha); the ancestral variant replaces part of the noise by new noise;
- PNDM without Runge-Kutta start (Liu et al., arXiv 2202.09778, eq. 12): DDIM with a linear multistep
  combination in the place of the output;
- DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): DDIM plus a multiple of the change of x0; its SDE
  variant replaces noise as the ancestral Euler does;
- LCM (Luo et al., arXiv 2310.04378): a network trained to jump to x0, and new noise back to the next level.
A sampler is therefore a table of weights, computed once in float64 (`samplers.py`), and running it is one
`lax.scan` over the table's rows. Timesteps, latents and quirks are those of the `diffusers` scheduler that a
checkpoint names.

Shapes: b batch, h w latent pixel, z latent channel, k remembered calls, n call, l text position, d width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax import samplers

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Fresh = Callable[[jax.Array], jax.Array]  # number of the call, traced -> standard normal noise of the latent's shape


# Defaults of classes whose schedule is not that of the others.
_BETAS = {"LCMScheduler": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")}


def _betas(config: Mapping[str, Any]) -> np.ndarray:
  """Per-timestep noise variances, float32, rounded where PyTorch rounds."""
  train = config.get("num_train_timesteps", 1000)
  if config.get("trained_betas") is not None:
    betas = np.asarray(config["trained_betas"], np.float32)
    if betas.shape != (train,):
      raise ValueError(f"scheduler_config.json: trained_betas has shape {betas.shape}, but "
                       f"num_train_timesteps is {train}; make them agree.")
    return betas
  shape = samplers.choose("scheduler_config.json: beta_schedule", config.get("beta_schedule", "linear"),
                          ("linear", "scaled_linear", "squaredcos_cap_v2"))
  if shape == "squaredcos_cap_v2":
    alpha = [math.cos((i / train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train + 1)]
    return np.array([min(1 - alpha[i + 1] / alpha[i], 0.999) for i in range(train)], np.float32)
  power = 2 if shape == "scaled_linear" else 1
  first, last = (np.float32(config.get(field, default) ** (1 / power))
                 for field, default in (("beta_start", 0.0001), ("beta_end", 0.02)))
  # torch.linspace: a float32 step, counted from the nearer end, each point rounded once.
  step, i = np.float64((last - first) / np.float32(max(train - 1, 1))), np.arange(train)
  line = np.where(i < train // 2, first + step * i, last - step * (train - 1 - i))
  return line.astype(np.float32) ** power


def _without_signal_at_the_end(alphas: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(alpha) so that the last is 0 (arXiv 2305.08891, algorithm 1), rounded as PyTorch does."""
  signal = np.sqrt(alphas)
  signal, first = signal - signal[-1], signal[0]
  squared = (signal * (first / signal[0])) ** 2
  betas = 1 - np.append(squared[:1], squared[1:] / squared[:-1])
  return _alphas_cumprod(betas)


def _alphas_cumprod(betas: np.ndarray) -> np.ndarray:
  # PyTorch accumulates a float32 product in float64 and rounds each element.
  return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """How much noise each timestep holds, and the sampler settings that came with it.

  Attributes:
    alphas_cumprod: `[timesteps]` float32, the share of signal variance left at each timestep.
    prediction_type: "epsilon" or "v_prediction".
    kind: the checkpoint's own sampler, a value of `samplers.KINDS`; None if it is another one.
    config: the checkpoint's `scheduler_config.json`.
  """
  alphas_cumprod: np.ndarray
  prediction_type: str
  kind: str | None
  config: Mapping[str, Any]

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
    """Reads a `scheduler_config.json`; fields left out have the defaults of `diffusers`.

    Raises:
      ValueError: a field of the noise schedule has a value that is not supported. Fields of a sampler
        are judged by `make_sampler`, which knows the sampler that will run.
    """
    name = config.get("_class_name")
    prediction = samplers.choose("scheduler_config.json: prediction_type", config.get("prediction_type", "epsilon"),
                                 ("epsilon", "v_prediction"))
    alphas = _alphas_cumprod(_betas({**_BETAS.get(name, {}), **config}))
    if config.get("rescale_betas_zero_snr"):
      alphas = _without_signal_at_the_end(alphas)
    return cls(alphas, prediction, samplers.KINDS.get(name), config)


class Carry(NamedTuple):
  """What a sampler knows between two calls. Every leaf leads with the batch axis."""
  x_bhwz: jax.Array
  before_bhwz: jax.Array  # the latent one call earlier
  history_bkhwz: jax.Array  # newest first: outputs (PNDM) or x0 predictions (DPM-Solver++) of earlier calls


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """A table with one row for each call of the denoiser. Build it with `make_sampler`.

  Attributes:
    timesteps: `[n]` int32, or float32 for Euler, whose timesteps may have fractions.
    first: `[2]`, the first latent of image-to-image as weights of (x0, noise).
    sigma: standard deviation of a first latent that is noise alone; None if the sampler begins in the middle.
    scale: `[n]`, what the latent is multiplied by for the denoiser; None for nothing.
    x0: `[n, 2]`, the x0 prediction as weights of (latent, output).
    remember: `[n, 2]`, what a call adds to the history, as weights of (latent, output).
    weights: `[n, 3 + k]`, the next latent as weights of (latent, latent before, output, *history).
    noise: `[n]`, the weight of new noise in the next latent; None if no call asks for any.
  """
  timesteps: np.ndarray
  first: np.ndarray
  sigma: float | None
  scale: np.ndarray | None
  x0: np.ndarray
  remember: np.ndarray
  weights: np.ndarray
  noise: np.ndarray | None

  @property
  def calls(self) -> int:
    """How often the denoiser is called; PNDM calls it once more than it has steps."""
    return len(self.timesteps)

  @property
  def stochastic(self) -> bool:
    """Whether calls ask for new noise."""
    return self.noise is not None

  def start(self, noise_bhwz: jax.Array, x0_bhwz: jax.Array | None = None) -> Carry:
    """The carry before call 0, from standard normal noise; latents are float32 throughout.

    Args:
      noise_bhwz: standard normal noise.
      x0_bhwz: latents of a picture to begin from (image-to-image), noised as for the first timestep. None begins from
        noise alone.
    """
    noise_bhwz = noise_bhwz.astype(jnp.float32)
    if x0_bhwz is not None:
      x_bhwz = self.first[0] * x0_bhwz.astype(jnp.float32) + self.first[1] * noise_bhwz
    elif self.sigma is None:
      raise ValueError("a sampler made with strength below 1 begins from a picture: pass its latents as x0_bhwz.")
    else:
      x_bhwz = self.sigma * noise_bhwz
    b, *hwz = x_bhwz.shape
    return Carry(x_bhwz, x_bhwz, jnp.zeros((b, self.weights.shape[1] - 3, *hwz), jnp.float32))

  def run(self, denoise: Denoise, carry: Carry, start: int, stop: int, fresh: Fresh | None = None) -> Carry:
    """Makes the calls `start` to `stop - 1`; contiguous ranges compose to the whole.

    Bit for bit so if each has two calls or more: XLA folds the timestep of a single call into the denoiser,
    whose last digit may then round another way.

    Args:
      denoise: `(x_bhwz, t) -> output_bhwz`, with `t` a traced scalar of the timesteps' dtype. Traced once.
      carry: from `start`, or from the `run` that ended at call `start`.
      start: first call, static.
      stop: one past the last call, static.
      fresh: `call -> noise_bhwz`, standard normal noise for this call, whose number is a traced int32: fold it into
        the key. Only samplers that are `stochastic` ask.

    Raises:
      ValueError: there are no such calls, or a stochastic sampler got no `fresh`.
    """
    return self.run_with(lambda x_bhwz, t, _: (denoise(x_bhwz, t), None), carry, None, start, stop, fresh)[0]

  def run_with(self, denoise: Callable, carry: Carry, memory: Any, start: int, stop: int,
               fresh: Fresh | None = None) -> tuple[Carry, Any]:
    """`run` for a denoiser that hands something on, `(x_bhwz, t, memory) -> (output_bhwz, memory)`: `(carry, memory)`.

    Raises:
      ValueError: as `run`.
    """
    if not 0 <= start <= stop <= self.calls:
      raise ValueError(f"run({start}, {stop}) is outside of this sampler's {self.calls} calls.")
    if self.stochastic and fresh is None:
      raise ValueError("this sampler draws new noise in every call: pass fresh, a function from call to noise_bhwz.")

    def call(state, row):
      t, scale, remember, weights, number, share = row
      (x_bhwz, before_bhwz, history_bkhwz), memory = state
      output_bhwz, memory = denoise(x_bhwz if scale is None else scale * x_bhwz, t, memory)
      output_bhwz = output_bhwz.astype(x_bhwz.dtype)
      slots = history_bkhwz.shape[1]
      terms = [x_bhwz, before_bhwz, output_bhwz, *(history_bkhwz[:, k] for k in range(slots))]
      entry_bhwz = remember[0] * x_bhwz + remember[1] * output_bhwz
      history_bkhwz = jnp.concatenate([entry_bhwz[:, None], history_bkhwz], axis=1)[:, :slots]
      # A sum of products and not a dot, which accelerators would round to lower precision.
      next_bhwz = sum(w * term for w, term in zip(weights, terms))
      if share is not None:
        next_bhwz += share * fresh(number)
      return (Carry(next_bhwz, x_bhwz, history_bkhwz), memory), None

    numbers = np.arange(self.calls, dtype=np.int32) if self.stochastic else None
    rows = (self.timesteps, self.scale, self.remember, self.weights, numbers, self.noise)
    return jax.lax.scan(call, (carry, memory), jax.tree.map(lambda column: column[start:stop], rows))[0]

  def predict_x0(self, denoise: Denoise, carry: Carry, call: int) -> jax.Array:
    """Makes call number `call` and decodes its output to x0 directly (arXiv 2010.02502, eq. 9)."""
    x_bhwz = carry.x_bhwz if self.scale is None else self.scale[call] * carry.x_bhwz
    output_bhwz = denoise(x_bhwz, jnp.asarray(self.timesteps[call])).astype(x_bhwz.dtype)
    return self.x0[call, 0] * carry.x_bhwz + self.x0[call, 1] * output_bhwz


def make_sampler(schedule: Schedule, steps: int | None, kind: str | None = None, *,
                 timesteps: Sequence[int] | None = None, strength: float = 1.0, eta: float = 0.0) -> Sampler:
  """Plans a sampler.

  Args:
    schedule: the checkpoint's schedule.
    steps: number of sampling steps; None if `timesteps` are given.
    kind: another sampler than the checkpoint's, on its schedule: "ddim", "pndm", "dpm++", "euler", "euler_ancestral"
      or "lcm". With the checkpoint's fields `use_karras_sigmas` or `algorithm_type` set as well: "euler_karras",
      "dpm++_karras", "dpm++_sde", "dpm++_sde_karras".
    timesteps: explicit descending timesteps, DDIM only: each step then leads to the next one in the list.
      To stop at a noise level, end the list there, `run` all calls but the last and `predict_x0` with it.
    strength: below 1, the calls of image-to-image: the share `strength` of the steps, at the end, to `start` from a
      picture. The multistep samplers begin anew there, so they are not calls of the whole sampler.
    eta: DDIM only; the share of new noise in the noise, 0 for none, 1 for that of DDPM (arXiv 2010.02502, eq. 16).

  Raises:
    ValueError: the checkpoint asks for a variant that is not supported (the field is named), or the
      schedule cannot be cut into so many steps.
  """
  return Sampler(**samplers.table(schedule.alphas_cumprod, schedule.prediction_type, schedule.config, kind, steps,
                                  timesteps, strength, eta))


def sample(denoise: Denoise, noise_bhwz: jax.Array, sampler: Sampler, fresh: Fresh | None = None,
           x0_bhwz: jax.Array | None = None) -> jax.Array:
  """Latents from standard normal noise: all calls of the sampler; see `Sampler.start` and `Sampler.run`."""
  return sampler.run(denoise, sampler.start(noise_bhwz, x0_bhwz), 0, sampler.calls, fresh).x_bhwz


def guide(unet_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], text_bld: jax.Array,
          null_bld: jax.Array, scale: float | jax.Array, stop_unconditional: bool = False,
          rescale: float | jax.Array = 0.0) -> Denoise:
  """Classifier-free guidance (arXiv 2207.12598, eq. 6, in the form null + scale * (text - null)).

  Args:
    unet_fn: `(x_bhwz, t_b, text_bld) -> output_bhwz`.
    text_bld: prompt embeddings.
    null_bld: embeddings of the empty prompt, `[b, l, d]` or `[1, l, d]`.
    scale: guidance scale, traced unless it is the Python number 1, which needs no unconditional half.
    stop_unconditional: evaluate the unconditional half by itself and without gradient, so that its
      backward pass is not built; exact for the prompt's gradient through one call, whose latent does not
      depend on the prompt. Otherwise both halves are one batch of twice the size.
    rescale: how far the guided output goes back to the standard deviation of the prompt's own (arXiv 2305.08891,
      section 3.4, phi; `guidance_rescale` in `diffusers`), traced unless it is the Python number 0, which is off.

  Returns:
    `denoise(x_bhwz, t)`. Both forms return the same numbers; the one with halves apart takes a time for each row, too.
  """
  inputs, guided = doubled(text_bld, null_bld, scale, rescale)
  if not stop_unconditional or off(scale):
    return lambda x_bhwz, t: guided(unet_fn(*inputs(x_bhwz, t)))
  b, null_bld = text_bld.shape[0], jnp.broadcast_to(null_bld, text_bld.shape)

  def separate(x_bhwz, t):
    # Stopped at both ends: nothing is linearised going in, and parameters get no gradient coming out.
    null_bhwz = unet_fn(*jax.lax.stop_gradient((x_bhwz, jnp.full((b,), t), null_bld)))
    null_bhwz = jax.lax.stop_gradient(null_bhwz).astype(jnp.float32)
    return _guided(null_bhwz, unet_fn(x_bhwz, jnp.full((b,), t), text_bld).astype(jnp.float32), scale, rescale)

  return separate


def off(scale: float | jax.Array) -> bool:
  """Whether a guidance scale is the Python number 1, which needs no unconditional half."""
  return isinstance(scale, int | float) and scale == 1


def doubled(text_bld: jax.Array, null_bld: jax.Array, scale: float | jax.Array,
            rescale: float | jax.Array = 0.0) -> tuple[Callable, Callable]:
  """Guidance in two parts, around one call of the network with both halves in a batch of twice the size.

  Args:
    text_bld: as those of `guide`, and so are the others.

  Returns:
    `inputs(x_bhwz, t)`, what to call the network with, and `guided(output)`, what its output means.
  """
  b = text_bld.shape[0]
  if off(scale):
    return (lambda x_bhwz, t: (x_bhwz, jnp.full((b,), t), text_bld)), (lambda output: output.astype(jnp.float32))

  def inputs(x_bhwz, t):
    # The two halves alternate row by row: a batch axis that is sharded over devices stays in place.
    both_bld = jnp.stack([jnp.broadcast_to(null_bld, text_bld.shape), text_bld], axis=1)
    return jnp.repeat(x_bhwz, 2, axis=0), jnp.full((2 * b,), t), both_bld.reshape(2 * b, *text_bld.shape[1:])

  def guided(output):
    null_bhwz, text_bhwz = jnp.moveaxis(output.astype(jnp.float32).reshape(b, 2, *output.shape[1:]), 1, 0)
    return _guided(null_bhwz, text_bhwz, scale, rescale)

  return inputs, guided


def _guided(null_bhwz: jax.Array, text_bhwz: jax.Array, scale, rescale) -> jax.Array:
  output_bhwz = null_bhwz + scale * (text_bhwz - null_bhwz)
  if isinstance(rescale, int | float) and rescale == 0:
    return output_bhwz
  text_b111, output_b111 = (x.std((1, 2, 3), ddof=1, keepdims=True) for x in (text_bhwz, output_bhwz))
  return output_bhwz * (rescale * text_b111 / output_b111 + 1 - rescale)


def _amounts(schedule: Schedule, t_b: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Standard deviations of signal and noise at `t_b`, shaped to multiply `like`."""
  alpha_b = jnp.asarray(schedule.alphas_cumprod)[t_b].reshape(-1, *(1,) * (like.ndim - 1))
  return jnp.sqrt(alpha_b), jnp.sqrt(1 - alpha_b)


def stratified(key: jax.Array, rows: int, count: int) -> jax.Array:
  """Random places `[b]` out of `count`, spread so that every batch covers the whole range, which steadies a loss."""
  share_b = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
  return jnp.minimum((share_b * count).astype(jnp.int32), count - 1)


def add_noise(schedule: Schedule, x0_bhwz: jax.Array, noise_bhwz: jax.Array, t_b: jax.Array) -> jax.Array:
  """The forward process at integer timesteps `t_b`: sqrt(alpha) x0 + sqrt(1 - alpha) noise."""
  signal, spread = _amounts(schedule, t_b, x0_bhwz)
  return signal * x0_bhwz + spread * noise_bhwz


def velocity(schedule: Schedule, x0_bhwz: jax.Array, noise_bhwz: jax.Array, t_b: jax.Array) -> jax.Array:
  """v = sqrt(alpha) noise - sqrt(1 - alpha) x0 (arXiv 2202.00512, appendix D)."""
  signal, spread = _amounts(schedule, t_b, x0_bhwz)
  return signal * noise_bhwz - spread * x0_bhwz


def training_target(schedule: Schedule, x0_bhwz: jax.Array, noise_bhwz: jax.Array,
                    t_b: jax.Array) -> jax.Array:
  """What the denoiser should return for `add_noise(...)`: noise or v, as `prediction_type` says."""
  if schedule.prediction_type == "epsilon":
    return noise_bhwz
  return velocity(schedule, x0_bhwz, noise_bhwz, t_b)
