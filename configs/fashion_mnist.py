"""DIG-ZSL on Fashion-MNIST: real photographs, five seen and five unseen classes.

Command: python -m digzsl_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
Took: 129 to 290 seconds on two shared virtual CPU cores (jax 0.10.2).
Result: T1 71.8 +- 0.4, H 70.5 +- 1.0 over three seeds; plain Stable Diffusion 70.2 +- 0.5, 68.7 +- 0.7.
"""

from configs import base


def get_config():
  config = base.dig_zsl()
  with config.unlocked():
    config.data = dict(name="fashion_mnist", folder="", source="files",
                       train_per_class=400, test_per_class=400, seed=0)
  config.models.update(clip="embedded:fashion_mnist/clip", sd="embedded:fashion_mnist/sd",
                       judge="embedded:fashion_mnist/judge")
  # The CDM tells the validation classes apart from the first picture on; a class that is recognised in all its
  # pictures stops, or AdamW walks its token away from a word that is right (chosen on them, see README).
  config.tokens.update(slots=5, slots_per_body=5, images=8, stop_accuracy=0.9)
  config.generate.update(images=64)
  config.classifier.update(images=64)
  return config
