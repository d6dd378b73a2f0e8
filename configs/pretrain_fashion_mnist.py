"""The foundation models of the Fashion-MNIST world, trained on captions of the official training images.

Command: python -m digzsl_jax.main --config=configs/pretrain_fashion_mnist.py --workdir=runs/pretrain_fashion_mnist
Took: 1 hour and 43 minutes on two CPU cores that other work shared half of the time (jax 0.10.2).
Result: autoencoder 27.1 dB, judge 88.7 %, plain pictures right 77.5 %, up to mixed-up words 100.0 %.
"""

from configs import base


def get_config():
  config = base.pretrain()
  with config.unlocked():
    config.corpus = dict(name="fashion_mnist", folder="", source="files", images=60_000, mixup=0.45)
    config.judge.model.heads = dict(
        kind=("tee", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"))
  config.judge.model.pairs = (("pullover", "coat", "shirt"), ("tee", "dress"), ("sandal", "sneaker", "boot"))
  config.clip.training.steps = 1000  # ten classes take fewer updates than the 108 of scenes
  config.sd.training.steps = 3000
  config.export.world = "fashion_mnist"
  return config
