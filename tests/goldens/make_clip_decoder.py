"""Makes clip_decoder.npz: a tiny TResNet and ML-Decoders in PyTorch, with weights that `tests/random_weights.py` draws.

Command: python -m tests.goldens.make_clip_decoder (needs torch and timm). Of the photographs of 40 x 60 pixels:
"evaluation" and "training" features `[2, 2, 2, 256]`, and "running_var" of the last norm after training; "grouped"
logits `[2, 7]` of 7 classes, and "zero_shot" ones `[2, 5]`, whose queries are the first rows of the identity.
"""

import importlib
import pathlib

import numpy as np
import torch

from tests.random_weights import photographs, random_tensors


def drawn(model):
  shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
  tensors = {name: torch.from_numpy(tensor) for name, tensor in random_tensors(shapes).items()}
  model.load_state_dict(model.state_dict() | tensors)
  return model.eval()


@torch.no_grad()
def main():
  importlib.import_module("tests.oracle.conftest")  # declares what timm's torchvision lacks
  from timm.models.tresnet import TResNet

  from tests.oracle import torch_ml_decoder
  images_bchw = torch.from_numpy(np.moveaxis(photographs(40, 60), -1, 1).copy()).float() / 255
  trunk = drawn(TResNet([1, 2, 1, 1], width_factor=1 / 8, num_classes=0))
  out = {"evaluation": trunk.forward_features(images_bchw), "training": trunk.train().forward_features(images_bchw)}
  tokens_btc = out["evaluation"].flatten(2).transpose(1, 2)
  out = {name: value.permute(0, 2, 3, 1) for name, value in out.items()}
  out["running_var"] = trunk.body.layer4[0].conv3.bn.running_var
  out["grouped"] = drawn(torch_ml_decoder.fixed(7, 3, inputs=256, width=32))(tokens_btc)
  out["zero_shot"] = drawn(torch_ml_decoder.ZeroShot(20, inputs=256, width=32))(tokens_btc, torch.eye(20)[:5])
  path = pathlib.Path(__file__).with_name("clip_decoder.npz")
  np.savez_compressed(path, **{name: value.contiguous().numpy() for name, value in out.items()})


if __name__ == "__main__":
  main()
