"""Makes inception.npz: features of FID's Inception in PyTorch, with weights that `tests/random_weights.py` draws.

Command: python -m tests.goldens.make_inception (needs torch). Key "bilinear": float32 `[2, 2048]` of the pictures
of 60 x 80 pixels, resized as pytorch-fid does.
"""

import pathlib

import numpy as np
import torch

from tests.oracle.fid_inception import random_inception
from tests.random_weights import photographs


def main():
  images_bchw = torch.from_numpy(np.moveaxis(photographs(60, 80), -1, 1).copy()).float() / 255
  with torch.no_grad():
    resized = torch.nn.functional.interpolate(images_bchw, (299, 299), mode="bilinear", align_corners=False)
    features_bd = random_inception()(2 * resized - 1).numpy()
  np.savez_compressed(pathlib.Path(__file__).with_name("inception.npz"), bilinear=features_bd)


if __name__ == "__main__":
  main()
