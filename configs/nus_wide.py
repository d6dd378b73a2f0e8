"""CLIP-Decoder on NUS-WIDE: 925 seen and 81 unseen labels.

Command: python -m digzsl_jax.main --config=configs/nus_wide.py --config.data.folder=data/NUS-WIDE
Reads: the original lists and the photographs (docs/multilabel.md), and a CLIP from the hub.
Protocol: BiAM's and LESA's, every image counts; ML-Decoder's leaves out images without a label of the list that is
  ranked: --config.train.drop_empty=True --config.evaluate.drop_empty=True --config.data.name=nus_wide_csv.
Took: not yet run with these checkpoints and photographs, which want an accelerator.
Result: not yet measured.
"""

from configs import base


def get_config():
  config = base.clip_decoder_benchmark(name="nus_wide", folder="data/NUS-WIDE", size=224)
  # ZSL mAP, F1@3, F1@5, GZSL mAP, F1@3, F1@5. BiAM: the best of its log; ML-Decoder: its README (ZSL mAP) and paper.
  # CLIP-Decoder's paper claims 3.9 points more in ZSL and 2.3 in GZSL; its absolute numbers could not be found.
  config.report.published = (("BiAM", 26.43, 33.21, 30.07, 9.56, 15.98, 18.86),
                             ("ML-Decoder", 31.1, 34.1, 30.8, 19.9, 23.3, 26.1))
  return config
