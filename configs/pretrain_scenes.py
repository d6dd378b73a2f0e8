"""The foundation models of the scenes world (configs/base.py, pretrain): what the package ships.

Command: python -m digzsl_jax.main --config=configs/pretrain_scenes.py --workdir=runs/pretrain_scenes
Took: 2 hours on two CPU cores that a second training shared most of the time (jax 0.10.2).
Result: autoencoder 27.2 dB, judge 99.8 %, plain pictures right 30.8 %, up to mixed-up words 100.0 %.
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
