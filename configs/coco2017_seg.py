"""TagCLIP's tags and masks on MS-COCO 2017 val: 80 labels and background.

Command: python -m digzsl_jax.main --config=configs/coco2017_seg.py --config.data.folder=data/coco
Reads: annotations/instances_val2017.json, val2017, and a CLIP from the hub; pip install '.[data]' draws the outlines.
Took: not yet run with this checkpoint and these photographs, which want an accelerator.
Result: not yet measured. Published: mIoU 34.0, with a CRF 35.3 (--config.masks.crf=True).
"""

from configs import base


def get_config():
  config = base.tagclip_benchmark(name="coco", folder="data/coco", year=2017, split="", train=False)
  config.models.update(names="coco", background="coco")
  config.masks.update(names="coco", background="coco")
  config.report.published = (("CLS-SEG, paper", None, 34.0), ("CLS-SEG with CRF, paper", None, 35.3))
  return config
