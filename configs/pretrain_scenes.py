"""The foundation models of the scenes world (configs/base.py, pretrain): what the package ships.

Command: python -m digzsl_jax.main --config=configs/pretrain_scenes.py --workdir=runs/pretrain_scenes
"""

from configs import base


def get_config():
  config = base.pretrain()
  with config.unlocked():
    config.judge.model.heads = dict(
        texture=("plain", "striped", "checked"),
        colour=("crimson", "orange", "gold", "green", "teal", "violet"),
        shape=("circle", "square", "triangle", "star", "cross", "ring"))
  config.judge.model.pairs = (("crimson", "orange"), ("gold", "green"), ("teal", "violet"),
                              ("circle", "square"), ("triangle", "star"), ("cross", "ring"))
  return config
