"""Benches compute what their PyTorch peers do, on both gradient paths of the tokens."""

import dataclasses
import json
import sys

import diffusers  # noqa: F401
import pytest
import transformers  # noqa: F401

from digzsl_jax import checkpoint, files, logs, mesh
from digzsl_jax.bench import measure, peers, sizes, steps
from digzsl_jax.bench import run as bench

TORCHVISION = sys.modules.get("torchvision")
from digzsl_jax.bench import reference

# It hides torchvision in its own process; here other tests need it.
del sys.modules["torchvision"]
if TORCHVISION is not None:
  sys.modules["torchvision"] = TORCHVISION
from tests import test_bench as small_bench  # noqa: I001

SMALL = small_bench.smallest()


def compared(name, size, folder, batched=False):
  """The relative error, with the peer in this process."""
  models = sizes.Models(size, "float32")
  timed = steps.BENCHES[name](sizes.Place(size, models, mesh.make(1), batch=0, steps=3))
  call = timed.start()
  ours = timed.answer(call())
  models.write(folder, timed.parts)
  checkpoint.write_arrays(folder / "inputs.safetensors", timed.inputs)
  facts = dict(timed.facts, bench=name, dtype="float32", compiled=False, batched=batched)
  files.write_json(folder / "facts.json", facts)
  theirs = reference.BENCHES[name](reference.Given(folder))()
  return peers.agreement(name, ours, {key: reference.to_numpy(value) for key, value in theirs.items()}, "float32")


@pytest.mark.parametrize("name", [name for name in steps.BENCHES if name not in (*peers.WITHOUT, "tokens")])
def test_peers_agree(name, tmp_path):
  assert compared(name, SMALL, tmp_path) <= 1e-4


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("gradient", ["x0", "last"])
def test_tokens_agree(gradient, batched, tmp_path):
  settings = dataclasses.replace(SMALL.tokens, gradient=gradient, remat=gradient == "last")
  assert compared("tokens", SMALL._replace(tokens=settings, head=("mlp", 6)), tmp_path, batched) <= 1e-4


def test_a_peer_in_its_own_process(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sizes.SIZES, "tiny", lambda: SMALL)
  monkeypatch.setattr(measure, "PRODUCTS", {"cpu": 64})
  config = small_bench.config(compare="torch") | {"stages": ("fid",)}
  bench.run(config, tmp_path, logs.Log(tmp_path), False)
  ours, theirs = map(json.loads, capsys.readouterr().out.splitlines())
  assert (ours["implementation"], theirs["implementation"]) == ("digzsl_jax", "torch")
  assert ours["ratio"] == pytest.approx(theirs["p50_ms"] / ours["p50_ms"], rel=1e-3)
  assert ours["relative_error"] < 1e-6 and "torch" in theirs["versions"] and theirs["repetitions"] == 2
