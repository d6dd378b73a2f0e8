"""TagCLIP on the embedded multi-object scenes: tags and masks of 108 labels, nothing to train or to download.

Command: python -m digzsl_jax.main --config=configs/quickstart_tagclip.py --workdir=runs/quickstart_tagclip
Took: not yet measured.
Result: not yet measured.
"""

from configs import base


def get_config():
  return base.tagclip()
