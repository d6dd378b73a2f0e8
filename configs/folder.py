"""DIG-ZSL on your own photographs: a folder for each class, and a text file with the names of unseen classes.

Command: python -m digzsl_jax.main --config=configs/folder.py --config.data.folder=data/zoo
Settings: those of the benchmarks; docs/photographs.md says what the folder holds, unseen.txt among it.
Took: depends on the pictures; not yet run with the checkpoints of `base.benchmark`.
Result: depends on the pictures.
"""

from configs import base


def get_config():
  config = base.benchmark("folder", "data/zoo")
  with config.unlocked():
    config.data = {**config.data, "unseen": "unseen.txt", "test": "", "validation": 0.25}
  return config
