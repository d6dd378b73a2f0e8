"""Makes diffusion.npz: trajectories of `diffusers` schedulers under the analytic denoiser of the tests.

Command: python tests/goldens/make_diffusion.py (needs torch and diffusers).

Keys: "KIND/PREDICTION/SPACING/STEPS/latents" `[calls + 1, b, h, w, z]`, ".../timesteps" `[calls]`, and
"noise", "fresh" `[calls, b, h, w, z]` (what stochastic samplers draw), "alphas_cumprod/SCHEDULE".
"""

import importlib
import pathlib

import diffusers
import numpy as np
import torch

BASE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
DPM, EULER = diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler
CLASSES = {
  "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False)),
  "pndm": (diffusers.PNDMScheduler, dict(skip_prk_steps=True)),
  "dpm++": (DPM, {}),
  "dpm++_karras": (DPM, dict(use_karras_sigmas=True)),
  "dpm++_sde_karras": (DPM, dict(use_karras_sigmas=True, algorithm_type="sde-dpmsolver++")),
  "euler": (EULER, {}),
  "euler_karras": (EULER, dict(use_karras_sigmas=True)),
  "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
  "lcm": (diffusers.LCMScheduler, {}),
}
CASES = [
  ("ddim", "epsilon", "leading", 5), ("ddim", "v_prediction", "trailing", 3),
  ("pndm", "epsilon", "leading", 30), ("pndm", "v_prediction", "linspace", 5),
  ("dpm++", "epsilon", "linspace", 12), ("dpm++", "v_prediction", "leading", 5),
  ("dpm++_karras", "epsilon", "leading", 7), ("dpm++_sde_karras", "v_prediction", "linspace", 5),
  ("euler", "epsilon", "trailing", 4), ("euler", "v_prediction", "leading", 7),
  ("euler_karras", "epsilon", "linspace", 6),
  ("euler_ancestral", "epsilon", "trailing", 2), ("euler_ancestral", "v_prediction", "linspace", 5),
  ("lcm", "epsilon", "leading", 4), ("lcm", "v_prediction", "leading", 1),
]


def denoise(x, t):
  u = (float(t) + 1) / 1000
  return u * x + (1 - u) * torch.tanh(2 * x + 3 * u) / 2


def trajectory(scheduler, noise, fresh):
  """Latents of all calls; `fresh` takes the place of what the scheduler would draw."""
  draws = iter(torch.from_numpy(fresh))
  importlib.import_module(type(scheduler).__module__).randn_tensor = lambda *arguments, **named: next(draws)
  latents = [torch.from_numpy(noise) * scheduler.init_noise_sigma]
  for t in scheduler.timesteps:
    output = denoise(scheduler.scale_model_input(latents[-1], t), t)
    latents.append(scheduler.step(output, t, latents[-1]).prev_sample)
  return torch.stack(latents).numpy()


def main():
  noise = np.random.default_rng(0).standard_normal((2, 2, 3, 2)).astype(np.float32)
  fresh = np.random.default_rng(1).standard_normal((8, 2, 2, 3, 2)).astype(np.float32)
  arrays = {"noise": noise, "fresh": fresh}
  for kind, prediction, spacing, steps in CASES:
    cls, extra = CLASSES[kind]
    scheduler = cls(**BASE, **extra, prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    name = f"{kind}/{prediction}/{spacing}/{steps}"
    arrays[f"{name}/latents"] = trajectory(scheduler, noise, fresh)
    timesteps = scheduler.timesteps.numpy()
    arrays[f"{name}/timesteps"] = timesteps if timesteps.dtype == np.float32 else timesteps.astype(np.int32)
  for shape in ("linear", "scaled_linear", "squaredcos_cap_v2"):
    config = {**BASE, "beta_schedule": shape}
    arrays[f"alphas_cumprod/{shape}"] = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
  np.savez_compressed(pathlib.Path(__file__).with_name("diffusion.npz"), **arrays)


if __name__ == "__main__":
  main()
