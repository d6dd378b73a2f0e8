"""Makes diffusion.npz: trajectories of `diffusers` schedulers under the analytic denoiser of the tests.

Command: python tests/goldens/make_diffusion.py (needs torch and diffusers).

Keys: "KIND/PREDICTION/SPACING/STEPS/latents" `[calls + 1, b, h, w, z]`, ".../timesteps" `[calls]`, and
"noise", "alphas_cumprod/SCHEDULE".
"""

import pathlib

import diffusers
import numpy as np
import torch

BASE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
CLASSES = {
  "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False)),
  "pndm": (diffusers.PNDMScheduler, dict(skip_prk_steps=True)),
  "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
}
CASES = [
  ("ddim", "epsilon", "leading", 5), ("ddim", "v_prediction", "trailing", 3),
  ("pndm", "epsilon", "leading", 30), ("pndm", "v_prediction", "linspace", 5),
  ("dpm++", "epsilon", "linspace", 12), ("dpm++", "v_prediction", "leading", 5),
]


def denoise(x, t):
  u = (float(t) + 1) / 1000
  return u * x + (1 - u) * torch.tanh(2 * x + 3 * u) / 2


def main():
  noise = np.random.default_rng(0).standard_normal((2, 2, 3, 2)).astype(np.float32)
  arrays = {"noise": noise}
  for kind, prediction, spacing, steps in CASES:
    cls, extra = CLASSES[kind]
    scheduler = cls(**BASE, **extra, prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    latents = [torch.from_numpy(noise)]
    for t in scheduler.timesteps:
      latents.append(scheduler.step(denoise(latents[-1], t), t, latents[-1]).prev_sample)
    name = f"{kind}/{prediction}/{spacing}/{steps}"
    arrays[f"{name}/latents"] = torch.stack(latents).numpy()
    arrays[f"{name}/timesteps"] = scheduler.timesteps.numpy().astype(np.int32)
  for shape in ("linear", "scaled_linear", "squaredcos_cap_v2"):
    config = {**BASE, "beta_schedule": shape}
    arrays[f"alphas_cumprod/{shape}"] = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
  np.savez_compressed(pathlib.Path(__file__).with_name("diffusion.npz"), **arrays)


if __name__ == "__main__":
  main()
