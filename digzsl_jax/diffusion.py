"""Noise schedules, samplers and guidance over one function, `denoise(x_bhwz, t) -> output_bhwz`.

A latent at timestep t is x = sqrt(alpha) x0 + sqrt(1 - alpha) noise, alpha falling with t. The network's
output is the noise ("epsilon") or v = sqrt(alpha) noise - sqrt(1 - alpha) x0 ("v_prediction", Salimans & Ho,
arXiv 2202.00512). For either, x0 and noise are weighted sums of x and output, and so is every step of
- DDIM with eta 0 (Song et al., arXiv 2010.02502, eq. 12): predict both, mix them again at the next level;
- PNDM without Runge-Kutta start (Liu et al., arXiv 2202.09778, eq. 12): the same, with a linear multistep
  combination in the place of the output;
- DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): the same, plus a multiple of the change of x0.
A sampler is therefore a table of weights, computed once in float64, and running it is one `lax.scan` over
the table's rows. Timesteps, latents and quirks are those of the `diffusers` scheduler that a checkpoint
names.

Shapes: b batch, h w latent pixel, z latent channel, k remembered calls, n call, l text position, d width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Denoise = Callable[[jax.Array, jax.Array], jax.Array]

KINDS = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DPMSolverMultistepScheduler": "dpm++"}

# Fields whose default depends on the sampler that runs, not on the one that the file names.
_DEFAULTS = {
  "ddim": dict(timestep_spacing="leading", set_alpha_to_one=True),
  "pndm": dict(timestep_spacing="leading", set_alpha_to_one=False),
  "dpm++": dict(timestep_spacing="linspace"),
}
# What a file of this class means by leaving the field out. Files of other classes say nothing by it.
_ABSENT = {"DDIMScheduler": dict(clip_sample=True), "PNDMScheduler": dict(skip_prk_steps=False)}
# The only values that a sampler supports. `lower_order_final` and `euler_at_final` are not among them
# because a second-order solver that ends without noise takes its last step at first order in any case.
_REQUIRED = {
  "ddim": dict(clip_sample=False, thresholding=False),
  "pndm": dict(skip_prk_steps=True),
  "dpm++": dict(
    algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
    thresholding=False, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
    use_lu_lambdas=False, use_flow_sigmas=False, lambda_min_clipped=-math.inf, variance_type=None),
}


def _require(config: Mapping[str, Any], required: Mapping[str, Any], who: str) -> None:
  for field, value in required.items():
    if config.get(field, value) != value:
      raise ValueError(f"scheduler_config.json: {field}={config[field]!r} is not supported by {who}; "
                       f"it needs {field}={value!r}.")


def _choose(field: str, value: Any, legal: Sequence[str]) -> str:
  if value not in legal:
    raise ValueError(f"{field}={value!r} is not supported; choose one of {', '.join(map(repr, legal))}.")
  return value


def _betas(config: Mapping[str, Any]) -> np.ndarray:
  """Per-timestep noise variances, float32, rounded where PyTorch rounds."""
  train = config.get("num_train_timesteps", 1000)
  if config.get("trained_betas") is not None:
    betas = np.asarray(config["trained_betas"], np.float32)
    if betas.shape != (train,):
      raise ValueError(f"scheduler_config.json: trained_betas has shape {betas.shape}, but "
                       f"num_train_timesteps is {train}; make them agree.")
    return betas
  shape = _choose("scheduler_config.json: beta_schedule", config.get("beta_schedule", "linear"),
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


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """How much noise each timestep holds, and the sampler settings that came with it.

  Attributes:
    alphas_cumprod: `[timesteps]` float32, the share of signal variance left at each timestep.
    prediction_type: "epsilon" or "v_prediction".
    kind: the checkpoint's own sampler, "ddim", "pndm" or "dpm++"; None if it is another one.
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
    config = {**_ABSENT.get(config.get("_class_name"), {}), **config}
    _require(config, dict(rescale_betas_zero_snr=False), "any sampler")
    prediction = _choose("scheduler_config.json: prediction_type", config.get("prediction_type", "epsilon"),
                         ("epsilon", "v_prediction"))
    # PyTorch accumulates a float32 product in float64 and rounds each element.
    alphas = np.cumprod(np.float32(1) - _betas(config), dtype=np.float64).astype(np.float32)
    return cls(alphas, prediction, KINDS.get(config.get("_class_name")), config)


class Carry(NamedTuple):
  """What a sampler knows between two calls. Every leaf leads with the batch axis."""
  x_bhwz: jax.Array
  before_bhwz: jax.Array  # the latent one call earlier
  history_bkhwz: jax.Array  # newest first: outputs (PNDM) or x0 predictions (DPM-Solver++) of earlier calls


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """A table with one row for each call of the denoiser. Build it with `make_sampler`.

  Attributes:
    timesteps: `[n]` int32.
    x0: `[n, 2]`, the x0 prediction as weights of (latent, output).
    remember: `[n, 2]`, what a call adds to the history, as weights of (latent, output).
    weights: `[n, 3 + k]`, the next latent as weights of (latent, latent before, output, *history).
  """
  timesteps: np.ndarray
  x0: np.ndarray
  remember: np.ndarray
  weights: np.ndarray

  @property
  def calls(self) -> int:
    """How often the denoiser is called; PNDM calls it once more than it has steps."""
    return len(self.timesteps)

  def start(self, noise_bhwz: jax.Array) -> Carry:
    """The carry before call 0, from standard normal noise; latents are float32 throughout."""
    noise_bhwz = noise_bhwz.astype(jnp.float32)
    b, *hwz = noise_bhwz.shape
    return Carry(noise_bhwz, noise_bhwz, jnp.zeros((b, self.weights.shape[1] - 3, *hwz), jnp.float32))

  def run(self, denoise: Denoise, carry: Carry, start: int, stop: int) -> Carry:
    """Makes the calls `start` to `stop - 1`; contiguous ranges compose to the whole.

    Bit for bit so if each has two calls or more: XLA folds the timestep of a single call into the denoiser,
    whose last digit may then round another way.

    Args:
      denoise: `(x_bhwz, t) -> output_bhwz`, with `t` a traced int32 scalar. Traced once.
      carry: from `start`, or from the `run` that ended at call `start`.
      start: first call, static.
      stop: one past the last call, static.
    """
    if not 0 <= start <= stop <= self.calls:
      raise ValueError(f"run({start}, {stop}) is outside of this sampler's {self.calls} calls.")

    def call(carry, row):
      t, remember, weights = row
      x_bhwz, before_bhwz, history_bkhwz = carry
      output_bhwz = denoise(x_bhwz, t).astype(x_bhwz.dtype)
      slots = history_bkhwz.shape[1]
      terms = [x_bhwz, before_bhwz, output_bhwz, *(history_bkhwz[:, k] for k in range(slots))]
      entry_bhwz = remember[0] * x_bhwz + remember[1] * output_bhwz
      history_bkhwz = jnp.concatenate([entry_bhwz[:, None], history_bkhwz], axis=1)[:, :slots]
      # A sum of products and not a dot, which accelerators would round to lower precision.
      return Carry(sum(w * term for w, term in zip(weights, terms)), x_bhwz, history_bkhwz), None

    rows = (self.timesteps[start:stop], self.remember[start:stop], self.weights[start:stop])
    return jax.lax.scan(call, carry, rows)[0]

  def predict_x0(self, denoise: Denoise, carry: Carry, call: int) -> jax.Array:
    """Makes call number `call` and decodes its output to x0 directly (arXiv 2010.02502, eq. 9)."""
    output_bhwz = denoise(carry.x_bhwz, jnp.int32(self.timesteps[call])).astype(carry.x_bhwz.dtype)
    return self.x0[call, 0] * carry.x_bhwz + self.x0[call, 1] * output_bhwz


def make_sampler(schedule: Schedule, steps: int | None, kind: str | None = None,
                 timesteps: Sequence[int] | None = None) -> Sampler:
  """Plans a sampler.

  Args:
    schedule: the checkpoint's schedule.
    steps: number of sampling steps; None if `timesteps` are given.
    kind: "ddim", "pndm" or "dpm++" to run another sampler than the checkpoint's, on its schedule.
    timesteps: explicit descending timesteps, DDIM only: each step then leads to the next one in the list.
      To stop at a noise level, end the list there, `run` all calls but the last and `predict_x0` with it.

  Raises:
    ValueError: the checkpoint asks for a variant that is not supported (the field is named), or the
      schedule cannot be cut into so many steps.
  """
  kind = kind or schedule.kind
  if kind is None:
    raise ValueError(f"scheduler_config.json: _class_name={schedule.config.get('_class_name')!r} is not "
                     f"one of {', '.join(KINDS)}; choose a kind out of {', '.join(_DEFAULTS)} explicitly.")
  config = {**_DEFAULTS[_choose("kind", kind, tuple(_DEFAULTS))], **schedule.config}
  _require(config, _REQUIRED[kind], f"the {kind} sampler")
  train = len(schedule.alphas_cumprod)
  if timesteps is None:
    t_n = _spaced(kind, steps, train, config)
    next_n = t_n - train // steps  # not t_n[1:]: they differ for most spacings
  else:
    t_n = np.asarray(timesteps, np.int64)
    if kind != "ddim" or steps not in (None, len(t_n)):
      raise ValueError(f"explicit timesteps need kind='ddim' and no other number of steps; got kind={kind!r} "
                       f"and steps={steps} with {len(t_n)} timesteps.")
    _check_timesteps(t_n, train, "the explicit list")
    next_n = np.append(t_n[1:], -1)

  alphas = schedule.alphas_cumprod.astype(np.float64)
  clean = 1.0 if kind == "dpm++" or config["set_alpha_to_one"] else alphas[0]
  alpha = lambda t: np.where(t < 0, clean, alphas[t])
  if kind == "ddim":
    table = _ddim(alpha(t_n), alpha(next_n), schedule.prediction_type)
  elif kind == "dpm++":
    table = _dpm(alpha(t_n), alpha(np.append(t_n[1:], -1)), schedule.prediction_type)
  else:
    # The second call evaluates the end of the first step, then takes that step anew with the mean of both.
    again = t_n[1:2]  # empty if there is one step only
    from_n, to_n = np.insert(t_n, 1, again + train // steps), np.insert(next_n, 1, again)
    t_n = np.insert(t_n, 1, again)
    table = _pndm(alpha(from_n), alpha(to_n), schedule.prediction_type)
  x0 = np.stack([_predictions(a, schedule.prediction_type)[0] for a in alpha(t_n)])
  return Sampler(t_n.astype(np.int32), *(a.astype(np.float32) for a in (x0, *table)))


def _check_timesteps(t_n: np.ndarray, train: int, origin: str) -> None:
  if t_n.size == 0 or t_n[0] >= train or t_n[-1] < 0 or np.any(np.diff(t_n) >= 0):
    raise ValueError(f"{origin} does not give strictly descending timesteps between {train - 1} and 0; "
                     "use fewer steps or other timesteps.")


def _spaced(kind: str, steps: int | None, train: int, config: Mapping[str, Any]) -> np.ndarray:
  """Descending timesteps (arXiv 2305.08891, table 2, as `diffusers` rounds them)."""
  if steps is None or not 1 <= steps <= train:
    raise ValueError(f"steps={steps} must lie between 1 and the schedule's {train} timesteps.")
  spacing = _choose("scheduler_config.json: timestep_spacing", config["timestep_spacing"],
                    ("leading", "trailing", "linspace"))
  offset = config.get("steps_offset", 0) if spacing == "leading" else 0
  points = steps + (kind == "dpm++")  # DPM-Solver++ counts the noise-free end as a point, then drops it
  if spacing == "linspace":
    t_n = np.linspace(0, train - 1, points).round()[::-1][:steps]
  elif spacing == "leading":
    t_n = (np.arange(points) * (train // points))[::-1][:steps] + offset
  else:  # rounding of the float stride can leave one point too many, at timestep -1
    t_n = np.round(np.arange(train, 0, -train / steps))[:steps] - 1
  _check_timesteps(t_n, train, f"steps={steps} with timestep_spacing={spacing!r} and steps_offset={offset}")
  return t_n.astype(np.int64)


def _predictions(alpha: float, prediction: str) -> np.ndarray:
  """`[2, 2]`: rows x0 and noise, as weights of (latent, output)."""
  a, s = np.sqrt(alpha), np.sqrt(1 - alpha)
  return np.array([[1 / a, -s / a], [0, 1]] if prediction == "epsilon" else [[a, -s], [s, a]])


def _transfer(alpha: float, alpha_next: float, prediction: str) -> np.ndarray:
  """The deterministic step between two levels (arXiv 2010.02502, eq. 12), as weights of (latent, output).

  Both other samplers build on it: PNDM's eq. 9 and DPM-Solver++'s first-order update equal it.
  """
  return np.array([np.sqrt(alpha_next), np.sqrt(1 - alpha_next)]) @ _predictions(alpha, prediction)


def _ddim(alpha_n, next_n, prediction: str) -> tuple[np.ndarray, np.ndarray]:
  weights = np.zeros((len(alpha_n), 3))
  weights[:, [0, 2]] = [_transfer(a, b, prediction) for a, b in zip(alpha_n, next_n)]
  return np.zeros((len(alpha_n), 2)), weights


# Adams-Bashforth weights of (output, *history). The second call's output counts in its own step alone: the
# zeros are where the history still holds it.
_ADAMS_BASHFORTH = np.array([
  [1, 0, 0, 0, 0],
  [1 / 2, 1 / 2, 0, 0, 0],
  [3 / 2, 0, -1 / 2, 0, 0],
  [23 / 12, -16 / 12, 0, 5 / 12, 0],
  [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
  [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
])


def _pndm(alpha_n, next_n, prediction: str) -> tuple[np.ndarray, np.ndarray]:
  weights = np.zeros((len(alpha_n), 7))
  for n, (alpha, alpha_next) in enumerate(zip(alpha_n, next_n)):
    # A v output is turned into noise only after the combination, with the latent that the step leaves from.
    latent, output = _transfer(alpha, alpha_next, prediction)
    weights[n, 1 if n == 1 else 0] = latent
    weights[n, 2:] = output * _ADAMS_BASHFORTH[min(n, 5)]
  return np.tile([0, 1], (len(alpha_n), 1)), weights


def _dpm(alpha_n, next_n, prediction: str) -> tuple[np.ndarray, np.ndarray]:
  x0 = np.stack([_predictions(a, prediction)[0] for a in alpha_n])
  log_snr_n = np.log(alpha_n / (1 - alpha_n)) / 2
  weights = np.zeros((len(alpha_n), 4))
  for n, (alpha, alpha_next) in enumerate(zip(alpha_n, next_n)):
    weights[n, [0, 2]] = _transfer(alpha, alpha_next, prediction)
    if 0 < n < len(alpha_n) - 1:
      h_before, h = np.diff(log_snr_n[n - 1:n + 2])
      change = -np.sqrt(alpha_next) * np.expm1(-h) * h / (2 * h_before)
      weights[n, [0, 2]] += change * x0[n]
      weights[n, 3] = -change
  return x0, weights


def sample(denoise: Denoise, noise_bhwz: jax.Array, sampler: Sampler) -> jax.Array:
  """Latents from standard normal noise: all calls of the sampler."""
  return sampler.run(denoise, sampler.start(noise_bhwz), 0, sampler.calls).x_bhwz


def guide(unet_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], text_bld: jax.Array,
          null_bld: jax.Array, scale: float | jax.Array, stop_unconditional: bool = False) -> Denoise:
  """Classifier-free guidance (arXiv 2207.12598, eq. 6, in the form null + scale * (text - null)).

  Args:
    unet_fn: `(x_bhwz, t_b, text_bld) -> output_bhwz`.
    text_bld: prompt embeddings.
    null_bld: embeddings of the empty prompt, `[b, l, d]` or `[1, l, d]`.
    scale: guidance scale, traced unless it is the Python number 1, which needs no unconditional half.
    stop_unconditional: evaluate the unconditional half by itself and without gradient, so that its
      backward pass is not built; exact for the prompt's gradient through one call, whose latent does not
      depend on the prompt. Otherwise both halves are one batch of twice the size.

  Returns:
    `denoise(x_bhwz, t)`. Both forms return the same numbers.
  """
  null_bld = jnp.broadcast_to(null_bld, text_bld.shape)
  b = text_bld.shape[0]

  def conditional(x_bhwz, t):
    return unet_fn(x_bhwz, jnp.full((b,), t), text_bld).astype(jnp.float32)

  def separate(x_bhwz, t):
    # Stopped at both ends: nothing is linearised going in, and parameters get no gradient coming out.
    null_bhwz = unet_fn(*jax.lax.stop_gradient((x_bhwz, jnp.full((b,), t), null_bld)))
    null_bhwz = jax.lax.stop_gradient(null_bhwz).astype(jnp.float32)
    return null_bhwz + scale * (conditional(x_bhwz, t) - null_bhwz)

  def doubled(x_bhwz, t):
    # The two halves alternate row by row: a batch axis that is sharded over devices stays in place.
    both_bld = jnp.stack([null_bld, text_bld], axis=1).reshape(2 * b, *text_bld.shape[1:])
    output = unet_fn(jnp.repeat(x_bhwz, 2, axis=0), jnp.full((2 * b,), t), both_bld).astype(jnp.float32)
    null_bhwz, text_bhwz = jnp.moveaxis(output.reshape(b, 2, *output.shape[1:]), 1, 0)
    return null_bhwz + scale * (text_bhwz - null_bhwz)

  if isinstance(scale, int | float) and scale == 1:
    return conditional
  return separate if stop_unconditional else doubled


def _amounts(schedule: Schedule, t_b: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Standard deviations of signal and noise at `t_b`, shaped to multiply `like`."""
  alpha_b = jnp.asarray(schedule.alphas_cumprod)[t_b].reshape(-1, *(1,) * (like.ndim - 1))
  return jnp.sqrt(alpha_b), jnp.sqrt(1 - alpha_b)


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
