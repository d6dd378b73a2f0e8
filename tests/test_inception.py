"""FID's Inception without PyTorch: its golden features, and files that are not its weights."""

import pathlib

import numpy as np
import pytest
import safetensors.numpy

from digzsl_jax.models import cdm, hub, inception
from tests.random_weights import photographs, random_tensors

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "inception.npz")["bilinear"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  variables = hub._variables(hub.abstract(inception.InceptionV3, {}))
  shapes = {name: (hub._to_torch(np.broadcast_to(0, variable.shape)) if is_kernel else variable).shape
            for name, (_, variable, is_kernel) in variables.items()}
  path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
  safetensors.numpy.save_file(random_tensors(shapes), path)
  return path


def test_golden_features(weights):
  [got_bd] = cdm.streamed(inception.load(weights), batch=2)(photographs(60, 80))
  print(f"{np.abs(got_bd - GOLDEN).max():.1e} of {GOLDEN.max():.1f}")
  assert got_bd.shape == GOLDEN.shape == (2, inception.WIDTH) and GOLDEN.std() > 0.2
  np.testing.assert_allclose(got_bd, GOLDEN, rtol=0, atol=1e-5)


def test_weights_that_are_absent_or_pickled(tmp_path):
  (tmp_path / "pt_inception.pth").write_bytes(b"PK")
  for path in tmp_path / "inception.safetensors", tmp_path / "pt_inception.pth", tmp_path:
    with pytest.raises(hub.CheckpointError, match=f"no safetensors file {path} .*download https.*digzsl_jax.convert"):
      inception.load(path)


def test_weights_of_another_network(tmp_path, weights):
  tensors = safetensors.numpy.load_file(weights)
  tensors["AuxLogits.conv0.bn.bias"] = tensors.pop("Mixed_7c.branch_pool.bn.bias")  # torchvision's has such
  safetensors.numpy.save_file(tensors, path := tmp_path / "other.safetensors")
  with pytest.raises(hub.CheckpointError, match=r"missing \(1\): Mixed_7c.branch_pool.bn.bias(.|\n)*AuxLogits"):
    inception.load(path)


def test_unknown_resize(weights):
  with pytest.raises(ValueError, match="resize is 'nearest'; it must be one of bilinear, bicubic_antialias"):
    inception.load(weights, resize="nearest")
