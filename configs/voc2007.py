"""TagCLIP on PASCAL VOC 2007 test: 20 labels, difficult objects count as present.

Command: python -m digzsl_jax.main --config=configs/voc2007.py --config.data.folder=data/VOCdevkit/VOC2007
Reads: Annotations, ImageSets/Main and JPEGImages of the development kit, and a CLIP from the hub.
Took: not yet run with this checkpoint and these photographs, which want an accelerator.
Result: not yet measured. Published: mAP 92.8.
"""

from configs import base


def get_config():
  config = base.tagclip_benchmark(name="voc", folder="data/VOCdevkit/VOC2007", train="", test="test", lists="Main")
  config.stages = ("tags", "evaluate", "report")  # few of its pictures have true masks
  config.models.update(names="voc", background="voc")
  config.masks.update(last_layer=10, threshold=0.4, names="voc", background="voc")
  config.report.published = (("TagCLIP, paper", 92.8, None), ("TagCLIP, its repository", 92.8, None))
  return config
