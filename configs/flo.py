"""DIG-ZSL on FLO (Oxford 102 Flowers): 82 seen and 20 unseen classes.

Command: python -m digzsl_jax.main --config=configs/flo.py --config.data.folder=data/FLO
Reads: the photographs and, for the published rows, att_splits.mat (docs/benchmarks.md).
Published: the paper (arXiv 2412.17219): T1 70.9, H 81.7; U and S could not be found.
Took: not yet run with the checkpoints of `base.benchmark`, which want an accelerator.
Result: not yet measured.
"""

from configs import base


def get_config():
  config = base.benchmark("flo", "data/FLO")
  with config.unlocked():
    config.data.update(source="files", data_dir="")  # or "tfds", and where it keeps its data
  config.report.published = (  # method, T1, U, S, H; the lower rows as in the README of SDGZSL
      ("DIG-ZSL", 70.9, None, None, 81.7),
      ("f-VAEGAN-D2", 67.7, 56.8, 74.9, 64.6),
      ("TF-VAEGAN", 70.8, 62.5, 84.1, 71.7))
  return config
