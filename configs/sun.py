"""DIG-ZSL on SUN (SUN Attribute): 645 seen and 72 unseen classes.

Command: python -m digzsl_jax.main --config=configs/sun.py --config.data.folder=data/SUN
Reads: the photographs and, for the published rows, att_splits.mat and res101.mat (docs/benchmarks.md).
Published: the paper (arXiv 2412.17219): T1 68.8, H 48.5; U and S could not be found.
Took: not yet run with the checkpoints of `base.benchmark`, which want an accelerator.
Result: not yet measured.
"""

from configs import base


def get_config():
  config = base.benchmark("sun", "data/SUN")
  config.report.published = (  # method, T1, U, S, H; the lower rows as in the README of SDGZSL and of ZeroDiff
      ("DIG-ZSL", 68.8, None, None, 48.5),
      ("f-VAEGAN-D2", 64.7, 45.1, 38.0, 41.3),
      ("TF-VAEGAN", 66.0, 45.6, 40.7, 43.0),
      ("ZeroDiff", 77.3, 63.0, 56.9, 59.8))
  return config
