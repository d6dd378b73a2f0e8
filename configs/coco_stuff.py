"""TagCLIP's tags and masks on COCO-Stuff 2017 val: 171 labels, masks measured by their 27 groups.

Command: python -m digzsl_jax.main --config=configs/coco_stuff.py --config.data.folder=data/coco
Reads: stuffthingmaps/val2017, val2017, and a CLIP from the hub; config.data.list names images in place of all.
Took: not yet run with this checkpoint and these photographs, which want an accelerator.
Result: not yet measured. Published: mIoU 30.1, with a CRF 31.0 (--config.masks.crf=True).
"""

from configs import base


def get_config():
  config = base.tagclip_benchmark(name="coco_stuff", folder="data/coco", list="")
  config.models.update(names="coco_stuff", background="coco_stuff")
  config.tags.update(first_layer=0, threshold=0.1)
  config.masks.update(names="coco_stuff", background="coco_stuff", unlabelled=False)
  config.evaluate.update(groups="stuff27", background=False)
  config.report.published = (("CLS-SEG, paper", None, 30.1), ("CLS-SEG with CRF, paper", None, 31.0))
  return config
