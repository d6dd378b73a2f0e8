"""ML-Decoder without PyTorch: goldens, first weights, dropout, queries and files."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from digzsl_jax.models import hub, ml_decoder
from tests.random_weights import random_tensors

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "clip_decoder.npz")
FEATURES = GOLDENS["evaluation"]
GROUPED = dict(classes=7, groups=3, inputs=256, width=32)
ZERO_SHOT = dict(query_width=20, inputs=256, width=32)
QUERIES = np.eye(20, dtype=np.float32)[:5]


def drawn(config, dtype=jnp.float32):
  model = hub.abstract(ml_decoder.MLDecoder, config, dtype=dtype)
  shapes = {name: (hub._to_torch(np.broadcast_to(0, variable.shape)) if is_kernel else variable).shape
            for name, (_, variable, is_kernel) in hub._variables(model).items()}
  return hub.fill(model, random_tensors(shapes), source="tiny")


@pytest.mark.parametrize("name, config, queries", [("grouped", GROUPED, ()), ("zero_shot", ZERO_SHOT, (QUERIES,))])
def test_golden(name, config, queries):
  found_bn, want_bn = drawn(config)(FEATURES, *queries), GOLDENS[name]
  print(f"{np.abs(found_bn - want_bn).max():.1e} of {np.abs(want_bn).max():.1f}")
  assert np.abs(want_bn).max() > 0.5 and np.abs(want_bn[0] - want_bn[1]).max() > 0.01
  np.testing.assert_allclose(found_bn, want_bn, rtol=0, atol=1e-5)
  low_bn = drawn(config, "bfloat16")(FEATURES, *queries)
  assert low_bn.dtype == jnp.float32 and 0 < np.abs(low_bn - want_bn).max() < 0.02 * np.abs(want_bn).max()


def test_a_label_is_scored_alike_whatever_others_are_asked_for():
  model = drawn(ZERO_SHOT)
  every_bk = model(FEATURES, QUERIES)
  np.testing.assert_allclose(model(FEATURES, QUERIES[[3, 1]]), every_bk[:, [3, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config, queries, says", [
    (GROUPED, QUERIES, "of 7 classes takes no queries"), (ZERO_SHOT, None, "of 0 classes needs queries"),
    (ZERO_SHOT, QUERIES[:, :4], r"shape \(5, 4\), wanted \[labels, 20\]"),
    (ZERO_SHOT, QUERIES[0], r"shape \(20,\), wanted \[labels, 20\]")])
def test_queries_that_do_not_fit(config, queries, says):
  with pytest.raises(ValueError, match=says):
    drawn(config)(FEATURES, queries)


def test_dropout():
  x, key = jnp.ones((400, 500)), jax.random.key(0)
  dropped = ml_decoder.dropout(x, 0.1, key)
  assert sorted(set(np.unique(dropped).tolist())) == [0, np.float32(1 / 0.9)]
  assert abs(float((dropped == 0).mean()) - 0.1) < 0.005
  model = drawn(GROUPED)
  first, again, other = (model(FEATURES, key=jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01 and np.abs(first - model(FEATURES)).max() > 0.01
  without = drawn(GROUPED | {"dropout": 0.0})
  np.testing.assert_allclose(without(FEATURES, key=key), without(FEATURES), rtol=0, atol=1e-5)


def test_first_weights():
  model = ml_decoder.MLDecoder.from_json(dict(classes=250), rngs=nnx.Rngs(0))
  near = lambda array, std: abs(float(jnp.std(array[...])) / std - 1) < 0.03
  assert model.duplicate_pooling.shape == (100, 768, 3)
  assert near(model.duplicate_pooling, (2 / (3 * 868))**0.5) and not np.any(model.duplicate_pooling_bias[...])
  assert near(model.query_embed.weight, 1)
  layer = model.decoder.layers[0]
  for linear, inputs in (layer.linear1, 768), (layer.linear2, 2048), (model.embed_standart, 2048):
    assert near(linear.kernel, (3 * inputs)**-0.5) and abs(linear.kernel[...]).max() <= inputs**-0.5
  assert near(layer.linear1.bias, (3 * 768)**-0.5)
  assert near(layer.multihead_attn.in_proj_weight, (2 / (768 * 4))**0.5)
  assert not np.any(layer.multihead_attn.in_proj_bias[...]) and not np.any(layer.multihead_attn.out_proj.bias[...])
  zero_shot = ml_decoder.MLDecoder.from_json({}, rngs=nnx.Rngs(0))
  assert zero_shot.duplicate_pooling.shape == (768, 1) and near(zero_shot.duplicate_pooling, (2 / 769)**0.5)


def test_queries_of_fixed_classes_are_not_trained():
  _, params, stats = nnx.split(drawn(GROUPED), nnx.Param, nnx.BatchStat)
  assert "query_embed" not in params and stats["query_embed"]["weight"].shape == (3, 32)


@pytest.mark.parametrize("change, says", [({"heads": 5}, "a width that the heads divide"), ({"groups": 0}, "positive"),
                                          ({"dropout": 1.0}, r"dropout in \[0, 1\)")])
def test_configs_that_do_not_fit(change, says):
  with pytest.raises(ValueError, match=says):
    ml_decoder.MLDecoder.from_json(GROUPED | change, rngs=nnx.Rngs(0))


def same(model, other):
  for one, two in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True):
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("config", [GROUPED, ZERO_SHOT, ZERO_SHOT | {"query_width": 32}])
def test_files(tmp_path, config):
  model = drawn(config)
  hub.save(model, tmp_path, config | {"model_type": "ml_decoder"}, dtype=np.float32)
  same(model, ml_decoder.load(tmp_path))
  same(model, ml_decoder.load(tmp_path / "model.safetensors"))


def test_files_of_other_heads(tmp_path):
  safetensors.numpy.save_file({"head.fc.weight": np.zeros((3, 4), np.float32)}, path := tmp_path / "a.safetensors")
  with pytest.raises(hub.CheckpointError, match="holds no ML-Decoder but another head, head.fc"):
    ml_decoder.load(path)
