"""TResNet against timm's: M, L and XL with random weights, their training mode, and the layouts of files.

Weights are timm's first ones with noise on every scale and bias, and a tenth as scale of each block's last norm, as
training starts from zero there. Running statistics are those of a batch. Features then come out with a largest value
of 5 to 7 and are compared divided by it. With residuals as large as their shortcuts the rounding of one layer grows
tenfold on the way, and PyTorch's own float32 answer is 5e-5 from its float64 one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch

torch = pytest.importorskip("torch")

import timm.models.tresnet as timm_tresnet
from flax import nnx

from digzsl_jax.models import hub, ml_decoder, tresnet
from tests.oracle import torch_ml_decoder
from tests.oracle.parity import to_numpy, to_torch
from tests.random_weights import photographs

TINY = [dict(layers=(1, 2, 1, 1), bottleneck=(False, False, True, True), width=8),
        dict(layers=(1, 1, 2, 1), bottleneck=(True,) * 4, width=8)]
PUBLISHED = {"M": "31.39", "L": "46.17"}  # millions with a classifier of 1000 classes; timm's results-imagenet.csv


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """PyTorch's threads spin while they wait, for longer than these networks take where others use the cores."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def timm_model(layers, bottleneck, width):
  return timm_tresnet.TResNet(list(layers), v2=bottleneck[0], width_factor=width / 64, num_classes=0)


def norms(model):
  return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def perturbed(config):
  torch.manual_seed(1)
  model = timm_model(**config).train()
  lasts = [block.conv3 if hasattr(block, "conv3") else block.conv2 for block in model.modules()
           if isinstance(block, timm_tresnet.BasicBlock | timm_tresnet.Bottleneck)]
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        parameter.normal_(1 if "bn.weight" in name else 0, 0.1)
    for last in lasts:
      last.bn.weight *= 0.1
  return model


def pictures(side, other=None):
  return photographs(side, other or side).astype(np.float32) / 255


def by_the_batch(model, images):
  """Sets the running statistics to those of `images`."""
  for norm in norms(model.train()):
    norm.momentum = 1.0
  with torch.no_grad():
    model.forward_features(images)
  for norm in norms(model):
    norm.momentum = 0.1


def converted(model, config):
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  return hub.fill(hub.abstract(tresnet.TResNet, config), tensors, source="timm")


def compare(got, want, what):
  want = want.detach().numpy() if torch.is_tensor(want) else want
  error, size = np.abs(np.asarray(got) - want).max(), np.abs(want).max()
  print(f"{what}: {error / size:.1e}, largest {size:.1f}")
  assert got.shape == want.shape and size > 0.1 and error <= 1e-5 * size


def compare_statistics(ours, theirs):
  """To 1e-5 of each norm's standard deviation and variance."""
  stats = {name: np.asarray(variable[...]) for name, (_, variable, _) in hub._variables(ours).items()}
  worst = 0
  for name, norm in theirs.named_modules():
    if isinstance(norm, torch.nn.BatchNorm2d):
      variance_d = norm.running_var.numpy()
      mean_error_d = np.abs(stats[f"{name}.running_mean"] - norm.running_mean.numpy()) / np.sqrt(variance_d).max()
      worst = max(worst, mean_error_d.max(),
                  np.abs(stats[f"{name}.running_var"] - variance_d).max() / variance_d.max())
  print(f"statistics: {worst:.1e}")
  assert worst <= 1e-5


def compiled(model, images, train):
  """`(features, the model with what became of its statistics)`."""
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

  def features(params, stats, images):
    model = nnx.merge(graphdef, params, stats)
    return model(images, train=train), nnx.state(model, nnx.BatchStat)

  features_bijd, stats = jax.jit(features)(params, stats, images)
  return features_bijd, nnx.merge(graphdef, params, stats)


def op_by_op(model, images, train):
  """The same; what is compiled of one network serves others."""
  return model(images, train=train), model


@torch.no_grad()
def check(theirs, ours, images, run, *modes):
  """Features in each of the modes, one after another, and the statistics after the last; returns ours with them."""
  for mode in modes:
    theirs.train(mode == "training")
    features_bijd, ours = run(ours, images, mode == "training")
    compare(features_bijd, to_numpy(theirs.forward_features(to_torch(images))), f"{images.shape[1:3]} {mode}")
  compare_statistics(ours, theirs)
  return ours


@pytest.mark.parametrize("name", tresnet.VARIANTS)
def test_features_and_training_mode(name):
  config, images = tresnet.VARIANTS[name], pictures(224)
  theirs = perturbed(config)
  by_the_batch(theirs, to_torch(images))
  ours = check(theirs, converted(theirs, config), images, op_by_op, "evaluation", "training")
  check(theirs, ours, pictures(448)[:1], op_by_op, "evaluation", *["training"] * (name == "M"))


@pytest.mark.parametrize("config, size", [(TINY[0], (20, 96)), (TINY[0], (60, 100)), (TINY[1], (36, 44))])
def test_odd_sides(config, size):
  theirs, images = perturbed(config), pictures(*size)
  by_the_batch(theirs, to_torch(images))
  check(theirs, converted(theirs, config), images, compiled, "evaluation", "training")


def shapes(model):
  return {name: (hub._to_torch(np.broadcast_to(0, variable.shape)) if is_kernel else variable).shape
          for name, (_, variable, is_kernel) in hub._variables(model).items()}


@pytest.mark.parametrize("name", tresnet.VARIANTS)
def test_names_and_number_of_parameters(name):
  config = tresnet.VARIANTS[name]
  with torch.device("meta"):
    theirs = timm_model(**config)
  wanted = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()
            if not key.endswith("num_batches_tracked")}
  ours = hub.abstract(tresnet.TResNet, config)
  assert shapes(ours) == wanted and ours.width == theirs.num_features == 2048
  count = sum(parameter.numel() for parameter in theirs.parameters())
  assert count == sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
  if name in PUBLISHED:
    assert f"{(count + 2049 * 1000) / 1e6:.2f}" == PUBLISHED[name]


def original(model):
  """The trunk's tensors as ML-Decoder's own files have them, where a norm is an InPlaceABN."""
  tensors = {key: tensor for key, tensor in model.state_dict().items() if ".se." in key}
  for name, module in model.named_modules():
    if isinstance(module, timm_tresnet.ConvNormAct):
      place = f"{name}.0" if getattr(module, "aa", None) else name
      tensors[f"{place}.0.weight"] = module.conv.weight.detach()
      signs = 1 - 2 * (torch.arange(len(module.bn.weight)) % 2)
      tensors[f"{place}.1.weight"] = signs * (module.bn.weight.detach().abs() - 1e-5)
      tensors |= {f"{place}.1.{key}": tensor for key, tensor in module.bn.state_dict().items()
                  if key in ("bias", "running_mean", "running_var")}
  return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """`(M in PyTorch with an ML-Decoder, its weights in timm's names, in the original's)`."""
  folder, model = tmp_path_factory.mktemp("tresnet"), perturbed(tresnet.VARIANTS["M"])
  with torch.no_grad():
    for norm in norms(model):
      norm.weight.copy_(norm.weight.abs() + 2e-5)
  model.head = torch_ml_decoder.fixed(9, 4)
  safetensors.torch.save_file(model.state_dict(), folder / "timm.safetensors")
  head = {f"head.{'decoder.' * (not key.startswith('decoder.'))}{key}": tensor
          for key, tensor in model.head.state_dict().items()}
  trunk = original(model)
  known = timm_tresnet.checkpoint_filter_fn(dict(trunk), model)
  assert known.keys() == {key for key in model.state_dict()
                          if not key.startswith("head.") and not key.endswith("num_batches_tracked")}
  safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in (trunk | head).items()},
                              folder / "original.safetensors")
  return model, folder / "timm.safetensors", folder / "original.safetensors"


def test_both_layouts_are_the_same_network(published):
  model, *paths = published
  first, second = ([*jax.tree.leaves(nnx.state(tresnet.load(path))), *jax.tree.leaves(nnx.state(ml_decoder.load(path)))]
                   for path in paths)
  for one, other in zip(first, second, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)
  ours = tresnet.load(paths[0])
  np.testing.assert_array_equal(ours.body.layer2[0].conv1.bn.weight[...],
                                model.body.layer2[0].conv1.bn.weight.detach())
  np.testing.assert_array_equal(ml_decoder.load(paths[0]).query_embed.weight[...],
                                model.head.query_embed.weight.detach())


def test_scales_of_pytorchs_own_norms_are_taken_as_they_are(published, tmp_path):
  tensors = safetensors.torch.load_file(published[2]) | {"body.conv1.1.num_batches_tracked": torch.tensor(3)}
  safetensors.torch.save_file(tensors, tmp_path / "norms.safetensors")
  np.testing.assert_array_equal(tresnet.load(tmp_path / "norms.safetensors").body.conv1.bn.weight[...],
                                tensors["body.conv1.1.weight"])


def test_gradients_in_training():
  """Of trunk and head without dropout, within 1e-4 of the largest of each parameter."""
  config, images = TINY[0], pictures(48, 64)
  theirs = perturbed(config)
  head = torch_ml_decoder.fixed(7, 3, inputs=theirs.num_features, width=32)
  for module in head.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
  head.decoder.layers[0].multihead_attn.dropout = 0.0
  sizes = dict(classes=7, groups=3, width=32, inputs=theirs.num_features, dropout=0.0)
  decoder = hub.fill(hub.abstract(ml_decoder.MLDecoder, sizes),
                     {name: tensor.numpy() for name, tensor in head.state_dict().items()}, source="timm")
  ours = nnx.Dict(trunk=converted(theirs, config), head=decoder)
  target = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
  loss = ((head.train()(theirs.train().forward_features(to_torch(images))) - torch.from_numpy(target))**2).mean()
  loss.backward()
  graphdef, params, stats = nnx.split(ours, nnx.Param, nnx.BatchStat)

  @jax.jit
  def gradient(params, stats, images):
    def loss(params):
      model = nnx.merge(graphdef, params, stats)
      logits = model["head"](model["trunk"](images, train=True), key=jax.random.key(0))
      return ((logits - target)**2).mean(), nnx.state(model, nnx.BatchStat)
    return jax.grad(loss, has_aux=True)(params)

  nnx.update(ours, *gradient(params, stats, jnp.asarray(images)))
  compare_statistics(ours["trunk"], theirs)
  found = {name: hub._to_torch(variable[...]) if is_kernel else variable[...]
           for name, (_, variable, is_kernel) in hub._variables(ours).items()}
  for part, model in ("trunk", theirs), ("head", head):
    for name, parameter in model.named_parameters():
      if parameter.requires_grad:
        want, got = parameter.grad.numpy(), np.asarray(found[f"{part}.{name}"])
        assert np.abs(want).max() > 0, name
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), name
