"""A denoiser for few steps on scenes, distilled from the one that the package ships (docs/generation_speed.md).

Command: python -m digzsl_jax.main --config=configs/lcm_scenes.py --workdir=runs/lcm_scenes
Took: 864 seconds on two CPU cores, most of which other work had (jax 0.10.2).
Result: the sampler `lcm` paints in 4 calls without guidance; CDM agreement 62.2, CMMD 0.121, H 73.3 on the quickstart.
"""

from configs import base


def get_config():
  config = base.pretrain()
  config.stages = ("lcm",)
  config.lcm.sd = "embedded:scenes/sd"
  return config
