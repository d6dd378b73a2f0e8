"""The tables that `diffusion.Sampler` runs: timesteps, and the weights of what is summed after each call.

All of it is numpy in float64, once per sampler. A level alpha holds sqrt(alpha) of x0 and sqrt(1 - alpha) of
noise, and an output of the network turns the latent into both. One step then serves every sampler here:
predict x0 and noise, mix them again at the next level, and let a share of that noise be new (`_step`; Song et
al., arXiv 2010.02502, eq. 12, whose eta sets the share). With eta 0 it is DDIM, Euler's step (Karras et al., arXiv
2206.00364, algorithm 1 without its correction), PNDM's eq. 9 and the first order of DPM-Solver++; with eta 1 it is the
ancestral Euler step and the first order of SDE-DPM-Solver++. What differs is which levels are visited, what two
multistep samplers add, and a unit: Euler's latents are x0 + sigma noise with sigma^2 = (1 - alpha) / alpha, so
divided by sqrt(alpha), and the network sees them multiplied by it again.

Timesteps, latents and quirks are those of the `diffusers` schedulers.

Shapes: n call, k remembered call.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KINDS = {
  "DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DPMSolverMultistepScheduler": "dpm++",
  "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_ancestral", "LCMScheduler": "lcm"}
# Choices that change fields of the checkpoint as well.
_KARRAS, _SDE = dict(use_karras_sigmas=True), dict(algorithm_type="sde-dpmsolver++")
VARIANTS = {
  "dpm++_karras": ("dpm++", _KARRAS), "dpm++_sde": ("dpm++", _SDE), "dpm++_sde_karras": ("dpm++", _KARRAS | _SDE),
  "euler_karras": ("euler", _KARRAS)}

ORIGINAL_STEPS = 50  # time steps that a network for LCM was distilled at, unless its file says otherwise

# Fields whose default depends on the sampler that runs, not on the one that the file names.
_DEFAULTS = {
  "ddim": dict(timestep_spacing="leading", set_alpha_to_one=True),
  "pndm": dict(timestep_spacing="leading", set_alpha_to_one=False),
  "dpm++": dict(timestep_spacing="linspace", algorithm_type="dpmsolver++", final_sigmas_type="zero",
                lower_order_final=True, euler_at_final=False, use_karras_sigmas=False),
  "euler": dict(timestep_spacing="linspace", final_sigmas_type="zero", use_karras_sigmas=False),
  "euler_ancestral": dict(timestep_spacing="linspace"),
  "lcm": dict(original_inference_steps=ORIGINAL_STEPS, timestep_scaling=10.0),
}
# What a file of a sampler's own class means by leaving the field out. Files of other classes say nothing by it.
_ABSENT = {"ddim": dict(clip_sample=True), "pndm": dict(skip_prk_steps=False)}
# Fields of other samplers that this one passes over, as it does in `diffusers`.
_IGNORED = {"euler_ancestral": dict(final_sigmas_type="zero", use_karras_sigmas=False)}
# The only values that a sampler supports.
_REQUIRED = {
  "ddim": dict(clip_sample=False, thresholding=False),
  # PNDM of diffusers does not know rescaled schedules and would run on another one than the network's.
  "pndm": dict(skip_prk_steps=True, rescale_betas_zero_snr=False),
  "dpm++": dict(
    solver_order=2, solver_type="midpoint", thresholding=False, use_exponential_sigmas=False, use_beta_sigmas=False,
    use_lu_lambdas=False, use_flow_sigmas=False, lambda_min_clipped=-math.inf, variance_type=None),
  "euler": dict(interpolation_type="linear", timestep_type="discrete", use_exponential_sigmas=False,
                use_beta_sigmas=False),
  "euler_ancestral": {},
  "lcm": dict(clip_sample=False, thresholding=False),
}
_EULER = ("euler", "euler_ancestral")


def choose(field: str, value: Any, legal: Sequence[str]) -> str:
  """Returns `value`, or raises ValueError if it is not among the legal ones."""
  if value not in legal:
    raise ValueError(f"{field}={value!r} is not supported; choose one of {', '.join(map(repr, legal))}.")
  return value


def _settle(config: Mapping[str, Any], kind: str | None) -> tuple[str, Mapping[str, Any]]:
  """The sampler out of `KINDS` that runs, and what the config means for it."""
  own = KINDS.get(config.get("_class_name"))
  names = (*KINDS.values(), *VARIANTS)
  if not (kind or own):
    raise ValueError(f"scheduler_config.json: _class_name={config.get('_class_name')!r} is not one of "
                     f"{', '.join(KINDS)}; choose a kind out of {', '.join(names)} explicitly.")
  kind, changes = VARIANTS.get(kind, (choose("sampler", kind or own, names), {}))
  config = {**_DEFAULTS[kind], **(_ABSENT.get(kind, {}) if kind == own else {}), **config, **changes,
            **_IGNORED.get(kind, {})}
  for field, value in _REQUIRED[kind].items():
    if config.get(field, value) != value:
      raise ValueError(f"scheduler_config.json: {field}={config[field]!r} is not supported by the {kind} sampler; "
                       f"it needs {field}={value!r}.")
  for field, legal in (("final_sigmas_type", ("zero", "sigma_min")),
                       ("algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))):
    if field in _DEFAULTS[kind]:
      choose(f"scheduler_config.json: {field}", config[field], legal)
  return kind, config


def table(alphas: np.ndarray, prediction: str, config: Mapping[str, Any], kind: str | None, steps: int | None,
          timesteps: Sequence[int] | None, strength: float, eta: float) -> dict[str, Any]:
  """The attributes of a `diffusion.Sampler`; arguments and errors are those of `diffusion.make_sampler`.

  Args:
    alphas: `[timesteps]` float32, of the schedule.
    prediction: "epsilon" or "v_prediction".
    config: the checkpoint's `scheduler_config.json`.
  """
  kind, config = _settle(config, kind)
  if eta and kind != "ddim":
    raise ValueError(f"eta={eta} needs kind='ddim'; got kind={kind!r}.")
  t_n, alpha_n, next_n, begin = _visits(alphas, config, kind, steps, timesteps, strength)
  if prediction == "epsilon" and not alpha_n.all():
    raise ValueError("scheduler_config.json: rescale_betas_zero_snr=True leaves no signal at timestep "
                     f"{t_n[alpha_n == 0][0]}, where prediction_type='epsilon' says nothing about x0; choose another "
                     "kind, number of steps or timestep_spacing.")

  if kind == "dpm++":
    columns = _dpm(alpha_n, next_n, prediction, config, few=steps < 15)
  elif kind == "lcm":
    columns = _lcm(t_n, alpha_n, prediction, config["timestep_scaling"])
  elif kind == "pndm":
    columns = _pndm(alpha_n, next_n, prediction)
  else:
    columns = _ddim(alpha_n, next_n, prediction, eta=1 if kind == "euler_ancestral" else eta)
  columns = dict(remember=np.zeros((len(t_n), 2)), scale=None, noise=None) | columns
  first, sigma = np.sqrt([alpha_n[0], 1 - alpha_n[0]]), 1.0
  if kind in _EULER:
    first = first / np.sqrt(alpha_n[0])
    sigma = math.hypot(*first) if config["timestep_spacing"] == "leading" else first[1]
    columns = _in_sigmas(columns, alpha_n, next_n)
  if columns["noise"] is not None and not columns["noise"].any():
    columns["noise"] = None  # as in one call of LCM
  columns = {name: None if column is None else column.astype(np.float32) for name, column in columns.items()}
  return dict(columns, timesteps=t_n.astype(np.float32 if kind in _EULER else np.int32), first=first.astype(np.float32),
              sigma=None if begin else np.float32(sigma))


def _begin(steps: int, strength: float) -> int:
  """The first call of image-to-image, counted as `StableDiffusionImg2ImgPipeline.get_timesteps` does."""
  if not (0 < strength <= 1 and int(steps * strength)):
    raise ValueError(f"strength={strength} must lie above 0 and not above 1, and leave at least one of steps={steps}.")
  return steps - int(steps * strength)


def _visits(alphas: np.ndarray, config: Mapping[str, Any], kind: str, steps: int | None,
            timesteps: Sequence[int] | None, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """Timesteps of the calls, the levels where their steps begin and where they end, and how many calls are left out."""
  train = len(alphas)
  if timesteps is not None:
    t_n = np.asarray(timesteps, np.int64)
    if kind != "ddim" or steps not in (None, len(t_n)):
      raise ValueError(f"explicit timesteps need kind='ddim' and no other number of steps; got kind={kind!r} "
                       f"and steps={steps} with {len(t_n)} timesteps.")
    _check_timesteps(t_n, train, "the explicit list")
  elif kind == "lcm":
    t_n = _distilled(steps, train, config)
  else:
    t_n = _spaced(kind, steps, train, config)
  begin = _begin(len(t_n), strength)
  if kind == "dpm++" or kind in _EULER:
    t_n, alpha_n, clean = _levels(t_n, alphas, config, kind)
    return t_n[begin:], alpha_n[begin:], np.append(alpha_n[1:], clean)[begin:], begin

  if kind == "pndm":
    t_n = np.insert(t_n, 1, t_n[1:2])  # nothing to repeat if there is one step only
  from_n = t_n = t_n[begin:]
  if timesteps is not None or kind == "lcm":
    to_n = np.append(t_n[1:], -1)
  else:
    stride = train // steps  # not the difference of neighbours, which is another one for most spacings
    to_n = t_n - stride
  if kind == "pndm":
    # The second call evaluates the end of the first step, then takes that step anew with the mean of both. It does so
    # wherever image-to-image begins, whichever call has the repeated timestep.
    again_n = np.arange(len(t_n)) == 1
    from_n, to_n = np.where(again_n, t_n + stride, t_n), np.where(again_n, t_n, to_n)
  alphas = alphas.astype(np.float64)
  clean = 1.0 if config.get("set_alpha_to_one") else alphas[0]
  level = lambda t_n: np.where(t_n < 0, clean, alphas[t_n])
  return t_n, level(from_n), level(to_n), begin


def _check_timesteps(t_n: np.ndarray, train: int, origin: str) -> None:
  if t_n.size == 0 or t_n[0] >= train or t_n[-1] < 0 or np.any(np.diff(t_n) >= 0):
    raise ValueError(f"{origin} does not give strictly descending timesteps between {train - 1} and 0; "
                     "use fewer steps or other timesteps.")


def _spaced(kind: str, steps: int | None, train: int, config: Mapping[str, Any]) -> np.ndarray:
  """Descending timesteps (arXiv 2305.08891, table 2, as `diffusers` rounds them)."""
  if steps is None or not 1 <= steps <= train:
    raise ValueError(f"steps={steps} must lie between 1 and the schedule's {train} timesteps.")
  spacing = choose("scheduler_config.json: timestep_spacing", config["timestep_spacing"],
                   ("leading", "trailing", "linspace"))
  offset = config.get("steps_offset", 0) if spacing == "leading" else 0
  points = steps + (kind == "dpm++")  # DPM-Solver++ counts the noise-free end as a point, then drops it
  if spacing == "linspace":
    line = np.linspace(0, train - 1, points)
    t_n = (line.astype(np.float32) if kind in _EULER else line.round())[::-1][:steps]  # Euler takes fractions
  elif spacing == "leading":
    t_n = (np.arange(points) * (train // points))[::-1][:steps] + offset
  else:  # rounding of the float stride can leave one point too many, at timestep -1
    t_n = np.round(np.arange(train, 0, -train / steps))[:steps] - 1
  _check_timesteps(t_n, train, f"steps={steps} with timestep_spacing={spacing!r} and steps_offset={offset}")
  return t_n if kind in _EULER else t_n.astype(np.int64)


def _distilled(steps: int | None, train: int, config: Mapping[str, Any]) -> np.ndarray:
  """Descending timesteps of LCM: evenly out of those that it was distilled for (arXiv 2310.04378, section 4.3)."""
  original = config["original_inference_steps"]
  if not 1 <= original <= train:
    raise ValueError(f"scheduler_config.json: original_inference_steps={original} must lie between 1 and the "
                     f"schedule's {train} timesteps.")
  if steps is None or not 1 <= steps <= original:
    raise ValueError(f"steps={steps} must lie between 1 and original_inference_steps={original} of LCM.")
  t_n = (np.arange(1, original + 1) * (train // original) - 1)[::-1]
  return t_n[np.linspace(0, original, steps, endpoint=False).astype(np.int64)]


def _levels(t_n: np.ndarray, alphas: np.ndarray, config: Mapping[str, Any],
            kind: str) -> tuple[np.ndarray, np.ndarray, float]:
  """Timesteps, levels and the last level of samplers whose steps lead from each level to the next."""
  if config.get("rescale_betas_zero_snr"):
    alphas = np.append(alphas[:-1], np.float32(2**-24))  # instead of 0, for sigma to be finite
  sigmas = np.sqrt((1 - alphas) / alphas)  # in float32, as where the reference looks timesteps up
  clean = 1.0 if config["final_sigmas_type"] == "zero" else np.float64(alphas[0])
  if not config["use_karras_sigmas"]:
    if kind == "dpm++":
      return t_n, alphas[t_n].astype(np.float64), clean
    return t_n, 1 / (1 + np.interp(t_n, np.arange(len(sigmas)), sigmas) ** 2), clean
  # arXiv 2206.00364, eq. 5 with rho = 7; Euler takes its ends from the spacing, DPM-Solver++ from the schedule.
  ends = np.interp(t_n[[0, -1]] if kind == "euler" else [len(sigmas) - 1, 0], np.arange(len(sigmas)), sigmas)
  high, low = (end if config.get(field) is None else config[field]
               for field, end in zip(("sigma_max", "sigma_min"), ends))
  sigma_n = (high ** (1 / 7) + np.linspace(0, 1, len(t_n)) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
  t_n = _timesteps_of(sigma_n, np.log(sigmas))
  if kind == "dpm++":
    t_n = (t_n if config.get("beta_schedule") == "squaredcos_cap_v2" else t_n.round()).astype(np.int64)
  return t_n, 1 / (1 + sigma_n**2), clean


def _timesteps_of(sigma_n: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
  """Timesteps, with fractions, where the schedule has these sigmas: interpolated in their logarithms."""
  log_n = np.log(sigma_n)
  low_n = np.clip(np.searchsorted(log_sigmas, log_n, side="right") - 1, 0, len(log_sigmas) - 2)
  low, high = log_sigmas[low_n], log_sigmas[low_n + 1]
  share_n = np.clip((low - log_n) / (low - high), 0, 1)
  return (1 - share_n) * low_n + share_n * (low_n + 1)


def _predictions(alpha: float, prediction: str) -> np.ndarray:
  """`[2, 2]`: rows x0 and noise, as weights of (latent, output)."""
  a, s = np.sqrt(alpha), np.sqrt(1 - alpha)
  return np.array([[1 / a, -s / a], [0, 1]] if prediction == "epsilon" else [[a, -s], [s, a]])


def _x0(alpha_n: np.ndarray, prediction: str) -> np.ndarray:
  return np.stack([_predictions(alpha, prediction)[0] for alpha in alpha_n])


def _step(alpha: float, alpha_next: float, prediction: str, eta: float = 0) -> tuple[np.ndarray, float]:
  """The step between two levels (arXiv 2010.02502, eq. 12 and 16): weights of (latent, output), weight of new noise."""
  ratio = (1 - alpha_next) / (1 - alpha) * alpha / alpha_next  # of noise to signal, squared
  new = eta**2 * max(1 - ratio, 0)
  mix = np.array([np.sqrt(alpha_next), np.sqrt(1 - alpha_next) * np.sqrt(1 - new)])
  return mix @ _predictions(alpha, prediction), np.sqrt((1 - alpha_next) * new)


def _ddim(alpha_n, next_n, prediction: str, eta: float) -> dict[str, np.ndarray]:
  weights, fresh = np.zeros((len(alpha_n), 3)), np.zeros(len(alpha_n))
  for n, (alpha, alpha_next) in enumerate(zip(alpha_n, next_n)):
    weights[n, [0, 2]], fresh[n] = _step(alpha, alpha_next, prediction, eta)
  return dict(x0=_x0(alpha_n, prediction), weights=weights, noise=fresh)


def _in_sigmas(columns: Mapping[str, np.ndarray], alpha_n, next_n) -> dict[str, np.ndarray]:
  """The same sampler on latents divided by sqrt(alpha): x0 + sigma noise."""
  scale, unit = np.sqrt(alpha_n), 1 / np.sqrt(next_n)
  x0, weights = columns["x0"].copy(), columns["weights"] * unit[:, None]
  x0[:, 0] *= scale
  weights[:, 0] *= scale
  return dict(columns, x0=x0, weights=weights, noise=columns["noise"] * unit, scale=scale)


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


def _pndm(alpha_n, next_n, prediction: str) -> dict[str, np.ndarray]:
  weights = np.zeros((len(alpha_n), 7))
  for n, (alpha, alpha_next) in enumerate(zip(alpha_n, next_n)):
    # A v output is turned into noise only after the combination, with the latent that the step leaves from.
    (latent, output), _ = _step(alpha, alpha_next, prediction)
    weights[n, 1 if n == 1 else 0] = latent
    weights[n, 2:] = output * _ADAMS_BASHFORTH[min(n, 5)]
  seen_n = np.where(np.arange(len(alpha_n)) == 1, next_n, alpha_n)
  return dict(x0=_x0(seen_n, prediction), remember=np.tile([0, 1], (len(alpha_n), 1)), weights=weights)


def _dpm(alpha_n, next_n, prediction: str, config: Mapping[str, Any], few: bool) -> dict[str, np.ndarray]:
  sde = config["algorithm_type"] == "sde-dpmsolver++"
  first_order_last = (config["final_sigmas_type"] == "zero" or config["euler_at_final"]
                      or config["lower_order_final"] and few)
  x0, last = _x0(alpha_n, prediction), len(alpha_n) - 1
  log_snr = lambda alpha: np.log(alpha / (1 - alpha)) / 2
  weights, fresh = np.zeros((len(alpha_n), 4)), np.zeros(len(alpha_n))
  for n, (alpha, alpha_next) in enumerate(zip(alpha_n, next_n)):
    weights[n, [0, 2]], fresh[n] = _step(alpha, alpha_next, prediction, eta=sde)
    if 0 < n < last or n == last > 0 and not first_order_last:
      h_before, h = np.diff(log_snr(np.array([alpha_n[n - 1], alpha, alpha_next])))
      change = -np.sqrt(alpha_next) * np.expm1(-(1 + sde) * h) * h / (2 * h_before)
      weights[n, [0, 2]] += change * x0[n]
      weights[n, 3] = -change
  return dict(x0=x0, remember=x0, weights=weights, noise=fresh)


def _lcm(t_n, alpha_n, prediction: str, scaling: float) -> dict[str, np.ndarray]:
  """The consistency function (arXiv 2310.04378, section 4.1) predicts x0; new noise leads back to the next level."""
  time = t_n * scaling
  skip, out = 0.5**2 / (time**2 + 0.5**2), time / np.sqrt(time**2 + 0.5**2)  # 0.5: standard deviation of the data
  x0 = out[:, None] * _x0(alpha_n, prediction)
  x0[:, 0] += skip
  next_n = np.append(alpha_n[1:], 1)
  weights = np.zeros((len(t_n), 3))
  weights[:, [0, 2]] = np.sqrt(next_n)[:, None] * x0
  return dict(x0=x0, weights=weights, noise=np.sqrt(1 - next_n))
