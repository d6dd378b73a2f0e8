"""DIG-ZSL on CUB (Caltech-UCSD Birds 200-2011): 150 seen and 50 unseen classes.

Command: python -m digzsl_jax.main --config=configs/cub.py --config.data.folder=data/CUB
Reads: the photographs and, for the published rows, att_splits.mat and res101.mat (docs/benchmarks.md).
Published: the paper (arXiv 2412.17219): T1 69.7; H, U and S could not be found.
Took: not yet run with the checkpoints of `base.benchmark`, which want an accelerator.
Result: not yet measured.
"""

from configs import base


def get_config():
  config = base.benchmark("cub", "data/CUB")
  with config.unlocked():
    config.data.update(source="files", data_dir="")  # or "tfds", and where it keeps its data
  config.report.published = (  # method, T1, U, S, H; the lower rows as in the README of SDGZSL and of ZeroDiff
      ("DIG-ZSL", 69.7, None, None, None),
      ("f-VAEGAN-D2", 61.0, 48.4, 60.1, 53.6),
      ("TF-VAEGAN", 64.9, 52.8, 64.7, 58.1),
      ("ZeroDiff", 87.5, 80.0, 83.2, 81.6))
  return config
