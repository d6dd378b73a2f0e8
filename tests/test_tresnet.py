"""TResNet without PyTorch: its goldens, first weights, and files that are another network's."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from digzsl_jax import mesh
from digzsl_jax.models import hub, tresnet
from tests.random_weights import photographs, random_tensors

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "clip_decoder.npz")
TINY = {"layers": [1, 2, 1, 1], "bottleneck": [False, False, True, True], "width": 8}
IMAGES = photographs(40, 60).astype(np.float32) / 255


def drawn(config):
  """The tensors of a file."""
  variables = hub._variables(hub.abstract(tresnet.TResNet, config))
  return random_tensors({name: (hub._to_torch(np.broadcast_to(0, variable.shape)) if is_kernel else variable).shape
                         for name, (_, variable, is_kernel) in variables.items()})


@pytest.fixture(scope="module")
def model():
  return hub.fill(hub.abstract(tresnet.TResNet, TINY), drawn(TINY), source="tiny")


def run(model, train, devices=1):
  """`(features, statistics)` of the images, compiled."""
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  rows = mesh.by_class(mesh.make(devices))

  @jax.jit
  def features(params, stats, images):
    model = nnx.merge(graphdef, params, stats)
    return model(images, train=train), nnx.state(model, nnx.BatchStat)

  return features(params, stats, jax.device_put(IMAGES, rows))


@pytest.mark.parametrize("mode, devices", [("evaluation", 1), ("training", 1), ("training", 2)])
def test_golden(model, mode, devices):
  """On two devices too: the statistics are those of the whole batch. Within 1e-5 of the largest feature, which is 14
  and 5."""
  found, stats = run(model, mode == "training", devices)
  want = GOLDENS[mode]
  print(f"{np.abs(found - want).max():.1e} of {np.abs(want).max():.1f}")
  assert found.shape == (2, 2, 2, 256) and want.std() > 0.2
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * want.max())
  before_d, got_d = (where["body"]["layer4"][0]["conv3"]["bn"]["running_var"][...] for where in
                     (nnx.state(model), stats))
  np.testing.assert_allclose(got_d, GOLDENS["running_var"] if mode == "training" else before_d, rtol=1e-5)


def test_first_weights():
  """Kaiming's over the outputs; the last norm of a block is zero, so that it is its shortcut."""
  model = tresnet.TResNet.from_json(TINY, rngs=nnx.Rngs(0))
  kernel = model.body.layer2[0].conv1.conv.kernel[...]  # 8 channels to 16
  assert abs(float(kernel.std()) * np.sqrt(9 * 16 / 2) - 1) < 0.05
  for stage in model.body.layer1, model.body.layer2:
    assert all(not np.any(block.conv2.bn.weight[...]) and np.all(block.conv1.bn.weight[...] == 1) for block in stage)
  assert not np.any(model.body.layer4[0].conv3.bn.weight[...])
  x_bijd = jax.random.uniform(jax.random.key(0), (1, 4, 4, 16))
  np.testing.assert_array_equal(model.body.layer2[1](x_bijd), x_bijd)


@pytest.mark.parametrize("dtype, out, kernel", [("bfloat16",) * 3, ("mixed", "float32", "bfloat16")])
def test_types(dtype, out, kernel):
  model = hub.fill(hub.abstract(tresnet.TResNet, TINY, dtype=dtype), drawn(TINY), source="tiny")
  features_bijd, _ = run(model, True)
  assert features_bijd.dtype == out and model.body.conv1.conv.kernel.dtype == kernel
  assert model.body.conv1.bn.running_var[...].dtype == model.body.conv1.bn.weight[...].dtype == jnp.float32
  error = np.abs(features_bijd.astype(jnp.float32) - GOLDENS["training"]).mean()
  assert 0 < error < 0.05 * GOLDENS["training"].std()


@pytest.mark.parametrize("size", [(38, 60), (60, 38), (16, 64)])
def test_sizes_that_do_not_fit(model, size):
  with pytest.raises(ValueError, match=f"images of {size[0]}x{size[1]} pixels.*at least 20 .* multiples of 4"):
    model(np.zeros((1, *size, 3), np.float32))


def test_one_position_cannot_be_trained_on(model):
  with pytest.raises(ValueError, match="one value for each channel has no variance"):
    model.body.conv1.bn(np.zeros((1, 1, 1, 8), np.float32), train=True)


@pytest.mark.parametrize("change, says", [({"layers": [1, 1]}, "one entry for each of four stages"),
                                          ({"width": 0}, "be positive"), ({"layers": "M"}, "layers='M'")])
def test_configs_that_do_not_fit(change, says):
  with pytest.raises(ValueError, match=says):
    tresnet.TResNet.from_json(TINY | change, rngs=nnx.Rngs(0))


def test_folder_round_trip(model, tmp_path):
  hub.save(model, tmp_path, TINY | {"model_type": "tresnet"}, dtype=np.float32)
  for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, tresnet.load(tmp_path))), strict=True):
    np.testing.assert_array_equal(one, other)


def test_files_of_other_networks(tmp_path):
  tensors = drawn(TINY)
  safetensors.numpy.save_file(tensors, path := tmp_path / "model.safetensors")
  with pytest.raises(hub.CheckpointError, match=r"\(1, 2, 1, 1\).* is none of ML-Decoder's M, L, XL\. L and XL of the "
                                                "TResNet and ASL repositories .* are other networks"):
    tresnet.load(path)
  (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "tresnet"}))  # what the error proposes
  assert tresnet.load(tmp_path).width == 256
  safetensors.numpy.save_file(tensors | {"neck.weight": np.zeros(3, np.float32)}, path)
  with pytest.raises(hub.CheckpointError, match=r"unexpected \(1\): neck.weight"):
    tresnet.load(tmp_path)
  safetensors.numpy.save_file({"conv1.weight": np.zeros(3, np.float32)}, path)
  with pytest.raises(hub.CheckpointError, match="holds no TResNet: no body.conv1"):
    tresnet.load(path)


def test_pickled_file(tmp_path):
  (path := tmp_path / "tresnet_m.pth").write_bytes(b"PK")
  with pytest.raises(hub.CheckpointError, match=r"is pickled.*digzsl_jax.convert .*tresnet_m\.pth .*\.safetensors"):
    tresnet.load(path)
