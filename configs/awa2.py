"""DIG-ZSL on AWA2 (Animals with Attributes 2): 40 seen and 10 unseen classes.

Command: python -m digzsl_jax.main --config=configs/awa2.py --config.data.folder=data/AWA2
Reads: the photographs and, for the published rows, att_splits.mat and res101.mat (docs/benchmarks.md).
Published: the paper (arXiv 2412.17219): T1 90.1; H, U and S could not be found.
Took: not yet run with the checkpoints of `base.benchmark`, which want an accelerator.
Result: not yet measured.
"""

from configs import base


def get_config():
  config = base.benchmark("awa2", "data/AWA2")
  config.report.published = (  # method, T1, U, S, H; the lower rows as in the README of SDGZSL and of ZeroDiff
      ("DIG-ZSL", 90.1, None, None, None),
      ("f-VAEGAN-D2", 71.1, 57.6, 70.6, 63.5),
      ("TF-VAEGAN", 72.2, 59.8, 75.1, 66.6),
      ("ZeroDiff", 87.3, 74.7, 89.3, 81.4))
  return config
