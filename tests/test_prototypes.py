"""What stands for the classes: texts by one template or many, attributes, a file."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import label_texts, logs, losses, main, workspace
from digzsl_jax.data import prompts
from digzsl_jax.models import cdm


@pytest.fixture
def make(tiny_config, tmp_path):
  """A workspace with changed settings of `models`."""
  def make(**models):
    config = tiny_config.copy_and_resolve_references()
    config.models.update(models)
    return workspace.Workspace(config.to_dict(), tmp_path, logs.Log(tmp_path))
  return make


def encode(ws, texts):
  graphdef, params = nnx.split(ws.clip)
  encode = jax.jit(lambda params, ids_bl: losses.normalise(nnx.merge(graphdef, params).encode_text(ids_bl)[0]))
  return np.asarray(encode(params, ws.clip_tokenizer(texts)))


def test_one_template(make):
  ws = make()
  texts = [f"a photo of a {name}" for name in ws.dataset.names]
  np.testing.assert_allclose(ws.prototypes_kd, encode(ws, texts), atol=1e-6)


@pytest.mark.parametrize("name", ["sun", "imagenet80"])
def test_a_set_of_templates_counts_by_its_mean(make, monkeypatch, name):
  ws = make(prototype_template=name)
  found_kd, some = ws.prototypes_kd, ws.dataset.names[:3]
  texts = [template.format(name=one) for one in some for template in prompts.TEMPLATES[name]]
  mean_kd = encode(ws, texts).reshape(len(some), -1, found_kd.shape[1]).mean(1)
  np.testing.assert_allclose(found_kd[:3], mean_kd / np.linalg.norm(mean_kd, axis=1, keepdims=True), atol=1e-5)
  assert np.abs(found_kd - make().prototypes_kd).max() > 1e-3
  assert ws.model_fingerprints["clip"] != make().model_fingerprints["clip"]
  monkeypatch.setattr(label_texts, "BATCH", 7)  # batches, the last one not full
  np.testing.assert_allclose(make(prototype_template=name).prototypes_kd, found_kd, atol=1e-5)


def test_attributes(make):
  ws = make(prototypes="attributes")
  with pytest.raises(ValueError, match='prototypes is "attributes", but scenes.* has none'):
    np.asarray(ws.prototypes_kd)
  attributes_ka = np.random.default_rng(0).normal(size=(len(ws.dataset.names), 5))
  ws.dataset = dataclasses.replace(ws.dataset, attributes_ka=attributes_ka)
  assert ws.model_fingerprints["clip"]["prototypes"] != make().model_fingerprints["clip"]["prototypes"]
  np.testing.assert_allclose(ws.prototypes_kd, attributes_ka / np.linalg.norm(attributes_ka, axis=1, keepdims=True),
                             atol=1e-6)
  attributes_ka[2] = 0
  del ws.prototypes_kd
  with pytest.raises(ValueError, match="those of .* are all zero"):
    np.asarray(ws.prototypes_kd)
  assert ws.text_prototypes_kd.shape[1] != 5  # zero-shot CLIP goes on with texts


def test_a_run_towards_prototypes_of_a_file(tiny_config, tmp_path):
  config = tiny_config.copy_and_resolve_references()
  config.models.prototypes, config.stages = str(tmp_path / "mine.npz"), ("cdm",)
  names = workspace.Workspace(tiny_config.to_dict(), tmp_path, logs.Log(tmp_path)).dataset.names
  run = lambda: main.METHODS["dig_zsl"](config.to_dict(), tmp_path / "run", logs.Log(tmp_path / "run"), False)
  with pytest.raises(ValueError, match="mine.npz cannot be read"):
    run()
  np.savez(tmp_path / "mine.npz", names=names, prototypes=np.random.default_rng(0).normal(size=(len(names), 7)))
  with pytest.raises(ValueError, match="kind is 'residual', which corrects CLIP's embedding towards texts"):
    run()
  config.cdm.kind = "mlp"
  run()
  assert {path.name for path in (tmp_path / "run" / "cdm").iterdir() if path.is_dir()} == {"test_mlp", "validation_mlp"}
  assert cdm.load_head(tmp_path / "run" / "cdm" / "test_mlp").outputs == 7


def test_templates():
  assert prompts.templates("a {name}", field="x") == ("a {name}",)
  assert len(prompts.templates("imagenet80", field="x")) == 80
  with pytest.raises(ValueError, match='x is "imagenet"; it must be a template with {name} or one of the sets photo'):
    prompts.templates("imagenet", field="x")
  with pytest.raises(ValueError, match="must contain {name} once"):
    prompts.templates("a {thing}", field="x")
