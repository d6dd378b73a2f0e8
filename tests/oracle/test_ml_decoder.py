"""ML-Decoder against timm's, and its zero-shot variant, which timm lacks, against one built of its layer."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from digzsl_jax.models import hub, ml_decoder
from tests.oracle import torch_ml_decoder
from tests.oracle.parity import close, perturbed

SMALL, FULL_SIZE = dict(inputs=24, width=32), dict(inputs=2048, width=768)


def noisy(model, size):
  return perturbed(model, 0.1 if size is SMALL else 0.02)


def converted(model):
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  return hub.fill(hub.abstract(ml_decoder.MLDecoder, ml_decoder.structure(tensors)), tensors, source="timm")


def draw(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("classes, groups, size", [(6, 6, SMALL), (11, 4, SMALL), (5, 9, SMALL), (1, 1, SMALL),
                                                   (80, 80, FULL_SIZE), (250, 100, FULL_SIZE)])
def test_full_and_grouped(classes, groups, size):
  theirs, tokens_btc = noisy(torch_ml_decoder.fixed(classes, groups, **size), size), draw(2, 49, size["inputs"])
  ours = converted(theirs)
  with torch.no_grad():
    want_bn = theirs(torch.from_numpy(tokens_btc))
  close(ours(tokens_btc), want_bn)
  np.testing.assert_array_equal(ours(tokens_btc.reshape(2, 7, 7, -1)), ours(tokens_btc))


@pytest.mark.parametrize("size, query_width", [(SMALL, 20), (SMALL, 32), (FULL_SIZE, 300), (FULL_SIZE, 512)])
def test_zero_shot_with_any_number_of_labels(size, query_width):
  theirs, tokens_btc = noisy(torch_ml_decoder.ZeroShot(query_width, **size), size), draw(2, 49, size["inputs"])
  ours = converted(theirs)
  for labels in 1, 81:
    queries_kw = draw(labels, query_width)
    with torch.no_grad():
      want_bk = theirs(*map(torch.from_numpy, (tokens_btc, queries_kw)))
    close(ours(tokens_btc, queries_kw), want_bk)
  memory_btd = ours.memory(tokens_btc)
  close(memory_btd.mean(1), torch.relu(theirs.embed_standart(torch.from_numpy(tokens_btc))).mean(1))
  np.testing.assert_array_equal(ours.decode(memory_btd, queries_kw), ours(tokens_btc, queries_kw))


def test_dropout_is_where_it_was(monkeypatch):
  """Each of the five in its place: a mask that depends on the last axis alone stands for a random one."""
  keep = lambda length: (np.arange(length) % 3 > 0) * 1.5
  theirs = perturbed(torch_ml_decoder.fixed(11, 4, **SMALL)).train()
  monkeypatch.setattr(torch.nn.functional, "dropout",
                      lambda x, *_, **__: x * torch.from_numpy(keep(x.shape[-1])).float())
  monkeypatch.setattr(ml_decoder, "dropout",
                      lambda x, rate, key: x if key is None else x * keep(x.shape[-1]).astype(np.float32))
  ours, tokens_btc = converted(theirs), draw(2, 7, 24)
  with torch.no_grad():
    want_bn = theirs(torch.from_numpy(tokens_btc))
  close(ours(tokens_btc, key=jax.random.key(0)), want_bn)
  assert np.abs(ours(tokens_btc) - want_bn.numpy()).max() > 0.01


@pytest.mark.parametrize("classes, groups", [(80, 80), (9605, 200)])
def test_names_and_number_of_parameters(classes, groups):
  """The original's sizes for COCO and OpenImages."""
  with torch.device("meta"):
    theirs = torch_ml_decoder.fixed(classes, groups)
  config = dict(classes=classes, groups=groups)
  ours = {name: variable.shape for name, (_, variable, _) in
          hub._variables(hub.abstract(ml_decoder.MLDecoder, config)).items()}
  assert ours.keys() == theirs.state_dict().keys()
  assert (sum(np.prod(shape, dtype=int) for shape in ours.values())
          == sum(tensor.numel() for tensor in theirs.state_dict().values()))
