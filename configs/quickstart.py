"""DIG-ZSL on the embedded scenes: 36 seen and 12 unseen classes, nothing to download.

Command: python -m digzsl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import base


def get_config():
  return base.dig_zsl()
