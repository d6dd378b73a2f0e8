"""TagCLIP's tags and masks on PASCAL VOC 2012 segmentation, val: 20 labels and background.

Command: python -m digzsl_jax.main --config=configs/voc2012_seg.py --config.data.folder=data/VOCdevkit/VOC2012
Reads: Annotations, ImageSets/Segmentation, JPEGImages and SegmentationClass of the development kit, and a CLIP from
  the hub.
Took: not yet run with this checkpoint and these photographs, which want an accelerator.
Result: not yet measured. Published: mIoU 64.8, with a CRF 68.7 (--config.masks.crf=True).
"""

from configs import base


def get_config():
  config = base.tagclip_benchmark(name="voc", folder="data/VOCdevkit/VOC2012", train="", test="val",
                                  lists="Segmentation")
  config.models.update(names="voc", background="voc")
  config.masks.update(last_layer=10, threshold=0.4, names="voc", background="voc")
  config.report.published = (("CLS-SEG, paper", None, 64.8), ("CLS-SEG, its repository", None, 64.7),
                             ("CLS-SEG with CRF, paper", None, 68.7))
  return config
