"""The vision transformer against transformers on perturbed random weights, through real folders."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch
from flax import nnx

from digzsl_jax.models import hub, vit
from tests.oracle.parity import close, perturbed, to_torch

CONFIG = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24,
              patch_size=8)
IMAGES = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


def _perturbed(model_type, **changes):
  return perturbed(model_type(transformers.ViTConfig(**CONFIG, attn_implementation="eager", **changes)))


@pytest.mark.parametrize("act, bias", [("gelu", True), ("quick_gelu", False)])
def test_feature_and_intermediates(tmp_path, act, bias):
  theirs = _perturbed(transformers.ViTModel, hidden_act=act, qkv_bias=bias)
  theirs.save_pretrained(tmp_path)
  assert "pooler.dense.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")
  with torch.no_grad():
    wanted = theirs(to_torch(IMAGES), output_hidden_states=True, output_attentions=True)
  feature_bd, out = hub.load(vit.ViT, tmp_path)(IMAGES)
  close(feature_bd, wanted.last_hidden_state[:, 0])
  close(out["patches"], wanted.last_hidden_state[:, 1:])
  assert len(out["hidden"]) == 3
  for name, reference in (("hidden", wanted.hidden_states), ("attention", wanted.attentions)):
    for ours, layer in zip(out[name], reference, strict=True):
      close(ours, layer)


@pytest.mark.parametrize("labels", [2, 5])
def test_classifier_is_kept_or_left_out(tmp_path, labels):
  theirs = _perturbed(transformers.ViTForImageClassification, num_labels=labels)
  theirs.save_pretrained(tmp_path)
  feature_bd, out = hub.load(vit.ViT, tmp_path, classifier=True)(IMAGES)
  close(out["logits"], theirs(to_torch(IMAGES)).logits)
  alone_bd, out = hub.load(vit.ViT, tmp_path)(IMAGES)
  assert "logits" not in out
  np.testing.assert_array_equal(alone_bd, feature_bd)


@pytest.mark.parametrize("classifier", [False, True])
def test_transformers_opens_what_save_writes(tmp_path, classifier):
  config = CONFIG | {"model_type": "vit", "id2label": {str(k): f"class {k}" for k in range(5)}}
  model = vit.ViT.from_json(config, classifier=classifier, rngs=nnx.Rngs(2))
  hub.save(model, tmp_path, config, dtype=np.float32)
  theirs, switches = ((transformers.ViTForImageClassification, {}) if classifier else
                      (transformers.ViTModel, {"add_pooling_layer": False}))
  opened, report = theirs.from_pretrained(tmp_path, output_loading_info=True, **switches)
  assert not any(report.values()), report
  feature_bd, out = model(IMAGES)
  if classifier:
    close(out["logits"], opened(to_torch(IMAGES)).logits)
  else:
    close(feature_bd, opened(to_torch(IMAGES)).last_hidden_state[:, 0])


@pytest.mark.parametrize("dtype, out, kernel, norm", [("float32",) * 4, ("bfloat16",) * 4,
                                                     ("mixed", "float32", "bfloat16", "float32")])
def test_types_of_features_and_parameters(dtype, out, kernel, norm):
  model = vit.ViT.from_json(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
  feature_bd, _ = model(IMAGES)
  assert feature_bd.dtype == out
  assert model.encoder.layer[0].intermediate.dense.kernel.dtype == kernel
  assert model.embeddings.patch_embeddings.projection.kernel.dtype == kernel
  assert model.layernorm.scale.dtype == norm


def test_images_of_another_size_are_refused():
  model = vit.ViT.from_json(CONFIG, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="32x24 pixels .* image_size 24"):
    model(np.zeros((1, 32, 24, 3), np.float32))
