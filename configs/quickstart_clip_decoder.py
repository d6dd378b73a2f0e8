"""CLIP-Decoder on the embedded multi-object scenes: 96 seen and 12 unseen labels, nothing to download.

Command: python -m digzsl_jax.main --config=configs/quickstart_clip_decoder.py --workdir=runs/quickstart_clip_decoder
Took: not yet measured.
Result: not yet measured.
"""

from configs import base


def get_config():
  return base.clip_decoder()
