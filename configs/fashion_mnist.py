"""DIG-ZSL on Fashion-MNIST: real photographs, five seen and five unseen classes.

Command: python -m digzsl_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
"""

from configs import base


def get_config():
  config = base.dig_zsl()
  with config.unlocked():
    config.data = dict(name="fashion_mnist", folder="", source="files",
                       train_per_class=400, test_per_class=400, seed=0)
  config.models.update(clip="embedded:fashion_mnist/clip", sd="embedded:fashion_mnist/sd",
                       judge="embedded:fashion_mnist/judge")
  config.tokens.update(slots=5, slots_per_body=5, images=8)
  config.generate.update(images=64)
  config.classifier.update(images=64)
  return config
