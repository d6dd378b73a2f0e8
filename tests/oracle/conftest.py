"""Parity tests draw the same weights in whatever order they run; a fixture of wider scope seeds by itself."""

import importlib.util
import os

import pytest

collect_ignore = [] if os.environ.get("DIGZSL_FULL_SIZE") else ["test_full_size.py"]  # an hour


def operators():
  """What torchvision needs to be imported, by timm and transformers: PyPI's build of it has its operators in a library
  that does not load without CUDA."""
  if not all(map(importlib.util.find_spec, ("torch", "torchvision"))):
    return None
  import torch
  try:
    importlib.import_module("torchvision")
  except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in "nms", "qnms":
      library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
  return None


OPERATORS = operators()  # they are gone when it is


@pytest.fixture(autouse=True)
def seeded():
  pytest.importorskip("torch").manual_seed(0)


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
  """`reference(name) -> (model, its folder)`: the module's REFERENCE with its CONFIGS[name] and random weights,
  perturbed so that no parameter is a neutral 0 or 1."""
  torch = pytest.importorskip("torch")
  base, made = tmp_path_factory.mktemp("references"), {}

  def reference(name):
    if name not in made:
      torch.manual_seed(0)
      model = request.module.REFERENCE(**request.module.CONFIGS[name]).eval()
      with torch.no_grad():
        for parameter in model.parameters():
          parameter += 0.02 * torch.randn_like(parameter)
      model.save_pretrained(base / name)
      made[name] = model, base / name
    return made[name]
  return reference
