"""CLIP-Decoder on MS-COCO 2017: 48 seen and 17 unseen labels, or all 80 seen with --config.data.split="".

Command: python -m digzsl_jax.main --config=configs/coco.py --config.data.folder=data/coco
Reads: annotations/instances_{train,val}2017.json and both folders of photographs, and a CLIP from the hub.
Took: not yet run with these checkpoints and photographs, which want an accelerator.
Result: not yet measured. Published for all 80 labels: ML-Decoder with TResNet-L at 448 pixels, mAP 90.1 (its README).
"""

from configs import base


def get_config():
  config = base.clip_decoder_benchmark(name="coco", folder="data/coco", year=2017, split="48/17", train=True, size=448)
  config.train.update(encoder="L", weight_decay=1e-4)  # parent
  return config
