"""CLIP-Decoder on your own pictures: a .csv file with the header `file,labels,split` (docs/multilabel.md).

Command: python -m digzsl_jax.main --config=configs/own_labels.py --config.data.table=data/mine.csv
  --config.data.unseen=unseen.txt
Reads: the pictures that the table names, and a CLIP from the hub; its frozen vision tower encodes them once.
Took: depends on your pictures.
Result: depends on your pictures.
"""

from configs import base


def get_config():
  config = base.clip_decoder_benchmark(name="table", table="data/mine.csv", unseen="", size=224)
  config.models.update(dtype="float32")
  config.train.update(encoder="clip", train_encoder=False, augment=False, batch=32, learning_rate=3e-4,
                      weight_decay=1e-4, coupled=False, average=0.99)
  return config
