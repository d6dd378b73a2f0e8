"""A CLIP of scenes of several objects, whose patches can be compared with texts: the small world of TagCLIP.

Command: python -m digzsl_jax.main --config=configs/pretrain_scenes_tags.py --workdir=runs/pretrain_scenes_tags
Took: 64 minutes on two CPU cores that other work shared most of the time (jax 0.10.2).
Result: with it TagCLIP has mAP 53.0 on scenes of several objects (configs/quickstart_tagclip.py).
"""

from configs import base


def get_config():
  config = base.pretrain()
  config.stages = ("tokenizer", "clip", "export")
  config.corpus.update(objects=4, mixup=0.1)
  config.clip.patches = 1.0
  config.clip.vision.update(hidden_size=96, intermediate_size=384, num_hidden_layers=6)
  config.clip.training.steps = 2000
  config.export.world = "scenes_tags"
  return config
