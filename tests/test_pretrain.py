"""Pre-training: an interrupted training ends as an undisturbed one; a dry run goes through everything."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, logs, loop
from digzsl_jax.models import cdm
from digzsl_jax.runs import pretrain


def fit(folder, monkeypatch, steps, stop=None):
  monkeypatch.setattr(loop, "SAVE_EVERY", 2)
  data = jax.random.normal(jax.random.key(0), (loop.HELD_OUT + 64, 3))
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

  def loss(model, frozen, batch, key):
    value = jnp.mean((model(batch) - batch.sum(-1, keepdims=True) + 0.1 * jax.random.normal(key, ())) ** 2)
    return value, {"loss": value}

  if stop:
    save = checkpoint.save_state

    def save_then_die(path, state):
      save(path, state)
      if int(state.step) == stop:
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "save_state", save_then_die)
  return loop.Loop("part", loop.Training(steps, 8, 0.1), model, loss, data, None, 0).run(folder, logs.Log(folder))


def test_resume_is_exact(tmp_path, monkeypatch):
  whole, _ = fit(tmp_path / "whole", monkeypatch, 6)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    fit(tmp_path / "cut", patch, 6, stop=4)
  resumed, held = fit(tmp_path / "cut", monkeypatch, 6)
  assert float(jnp.abs(whole.kernel[...]).sum()) > 0
  assert held["held_out_loss"] > 0
  jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(resumed))


def test_compiled_initialisation_is_the_plain_one():
  config = dict(kind="mlp", width=5, hidden=4, outputs=3)
  built, plain = loop.build(cdm.Head, config, 7), cdm.Head.from_json(config, rngs=nnx.Rngs(7))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), nnx.state(built), nnx.state(plain))


def test_dry_run_prints_the_cost_of_every_part(tiny_pretraining, quick_build, tmp_path, capsys, monkeypatch):
  def compile(lowered):  # for real it would take a minute
    assert "stablehlo.convolution" in (text := lowered.as_text()) or "stablehlo.dot_general" in text
    return types.SimpleNamespace(memory_analysis=lambda: None, cost_analysis=lambda: {"flops": 1e9},
                                 as_text=lambda: "all-reduce")

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
  config = tiny_pretraining.to_dict()
  pretrain.run(config, tmp_path / "run", logs.Log(tmp_path / "log"), True)
  printed = capsys.readouterr().out
  assert printed.count("  update: ") == 5 and printed.count("1.00 GFLOP") == 5
  assert not (tmp_path / "run").exists()
