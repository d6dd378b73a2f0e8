"""CLIP-Decoder on PASCAL VOC 2007: 20 labels, all seen unless config.data.unseen names a list.

Command: python -m digzsl_jax.main --config=configs/voc2007_decoder.py --config.data.folder=data/VOCdevkit/VOC2007
Reads: Annotations, ImageSets/Main and JPEGImages of the development kit, and a CLIP from the hub.
Took: not yet run with these checkpoints and photographs, which want an accelerator.
Result: not yet measured. Published: ML-Decoder, mAP 96.6 (secondary source).
"""

from configs import base


def get_config():
  config = base.clip_decoder_benchmark(name="voc", folder="data/VOCdevkit/VOC2007", train="trainval", test="test",
                                       unseen="", size=448)
  config.train.update(encoder="L", weight_decay=1e-4)  # as on COCO
  return config
