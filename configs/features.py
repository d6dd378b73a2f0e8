"""CDM and classifier on the features of an archive of the Proposed Splits, without any image: minutes on a laptop.

Command: python -m digzsl_jax.main --config=configs/features.py --config.data.folder=data/CUB
Reads: att_splits.mat, res101.mat (docs/benchmarks.md); for --config.models.prototypes=text also models.clip.
Own: --config.data.file=mine.mat in the layout of res101.mat; --config.data.benchmark= for classes of your own.
Took: not yet measured on real features.
Result: not yet measured on real features.
"""

from configs import base


def get_config():
  config = base.benchmark("features", "data/CUB")
  with config.unlocked():
    config.data = dict(name="features", folder="data/CUB", benchmark="CUB", file="res101.mat", validation=1.0, seed=0)
  config.stages = ("cdm", "classifier", "evaluate", "report")
  config.models.update(clip="", sd="", prototypes="attributes", dtype="float32")
  config.cdm.encoder = ""  # the features are there already
  return config
