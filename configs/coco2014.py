"""TagCLIP on MS-COCO 2014 val: 80 labels.

Command: python -m digzsl_jax.main --config=configs/coco2014.py --config.data.folder=data/coco
Reads: annotations/instances_val2014.json and val2014, and a CLIP from the hub.
Took: not yet run with this checkpoint and these photographs, which want an accelerator.
Result: not yet measured. Published: mAP 68.8.
"""

from configs import base


def get_config():
  config = base.tagclip_benchmark(name="coco", folder="data/coco", year=2014, split="", train=False)
  config.stages = ("tags", "evaluate", "report")
  config.models.update(names="coco", background="coco")
  config.masks.update(names="coco", background="coco")
  config.report.published = (("TagCLIP, paper", 68.8, None), ("TagCLIP, its repository", 68.7, None))
  return config
