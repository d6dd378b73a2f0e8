"""DIG-ZSL on the embedded scenes: 36 seen and 12 unseen classes, nothing to download.

Command: python -m digzsl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
Took: 93 seconds on two CPU cores left alone, nothing compiled before (jax 0.10.2).
Result: T1 53.9 +- 5.0, H 67.7 +- 4.2 over three seeds; plain Stable Diffusion 41.0 +- 4.9, 57.0 +- 4.5.
"""

from configs import base


def get_config():
  return base.dig_zsl()
