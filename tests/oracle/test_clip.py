"""The CLIP towers against transformers on perturbed random weights, through real folders."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import safetensors.torch
from flax import nnx

from digzsl_jax.models import clip, hub
from tests.oracle.parity import close, perturbed, to_torch

TEXT = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=11, bos_token_id=58, eos_token_id=59, pad_token_id=59)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24,
              patch_size=8)
IDS = np.array([[58, 3, 17, 59, 59, 59, 59, 59, 59, 59, 59], [58, 9, 59, 4, 59, 0, 0, 0, 0, 0, 0]])
IMAGES = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


def _text(**changes):
  return perturbed(transformers.CLIPTextModel(transformers.CLIPTextConfig(
      **TEXT | changes, attn_implementation="eager")))


def _vision(**changes):
  return perturbed(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
      **VISION | changes, attn_implementation="eager")))


def _both(**changes):
  return perturbed(transformers.CLIPModel(transformers.CLIPConfig(
      text_config=TEXT | changes, vision_config=VISION | changes, projection_dim=20)))


def _rename(folder, prefix, extra=None):
  """Writes the keys as hub files of 2022 have them."""
  file = folder / "model.safetensors"
  tensors = {prefix + key: value.clone() for key, value in safetensors.torch.load_file(file).items()}
  safetensors.torch.save_file(tensors | (extra or {}), file, {"format": "pt"})


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy", [False, True])
def test_text_tower(tmp_path, act, legacy):
  theirs = _text(hidden_act=act)
  theirs.save_pretrained(tmp_path)
  if legacy:
    _rename(tmp_path, "text_model.", {"text_model.embeddings.position_ids": torch.arange(11)[None]})
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(IDS), output_hidden_states=True, output_attentions=True)
  hidden_bld, out = hub.load(clip.CLIPTextModel, tmp_path)(IDS)
  close(hidden_bld, wanted.last_hidden_state)
  close(out["pooled"], wanted.pooler_output)
  assert len(out["hidden"]) == len(wanted.hidden_states) == 3
  for ours, reference in zip(out["hidden"], wanted.hidden_states):
    close(ours, reference)
  for ours, reference in zip(out["attention"], wanted.attentions, strict=True):
    close(ours, reference)


def test_text_end_of_legacy_configs_is_the_largest_id(tmp_path):
  theirs = _text(eos_token_id=2)
  theirs.save_pretrained(tmp_path)
  ids = np.array([[58, 2, 7, 59, 1], [58, 59, 2, 3, 4]])
  _, out = hub.load(clip.CLIPTextModel, tmp_path)(ids)
  close(out["pooled"], theirs(torch.from_numpy(ids)).pooler_output)


def test_gradient_with_respect_to_a_token(tmp_path):
  theirs = _text()
  theirs.save_pretrained(tmp_path)
  model = hub.load(clip.CLIPTextModel, tmp_path)
  weights = np.random.default_rng(3).normal(size=(2, 11, 32)).astype(np.float32)
  embeds = torch.from_numpy(np.array(model.embed(IDS))).requires_grad_()
  # The token embedding is swapped for a table of the wanted rows, since transformers takes ids alone.
  theirs.embeddings.token_embedding.forward = lambda ids: embeds
  (theirs(torch.from_numpy(IDS)).last_hidden_state * torch.from_numpy(weights)).sum().backward()
  ours = jax.grad(lambda e: (model(IDS, e)[0] * weights).sum())(jnp.asarray(embeds.detach().numpy()))
  error = np.abs(np.asarray(ours) - embeds.grad.numpy()).max()
  assert error <= 1e-5 * np.abs(embeds.grad.numpy()).max()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy", [False, True])
def test_vision_tower(tmp_path, act, legacy):
  theirs = _vision(hidden_act=act)
  theirs.save_pretrained(tmp_path)
  if legacy:
    _rename(tmp_path, "vision_model.", {"vision_model.embeddings.position_ids": torch.arange(10)[None]})
  values = []
  for layer in theirs.encoder.layers:
    layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
  with torch.no_grad():
    wanted = theirs(to_torch(IMAGES), output_hidden_states=True, output_attentions=True)
    patches = theirs.post_layernorm(wanted.last_hidden_state)[:, 1:]
  pooled_bd, out = hub.load(clip.CLIPVisionModel, tmp_path)(IMAGES)
  close(pooled_bd, wanted.pooler_output)
  close(out["patches"], patches)
  references = {"hidden": wanted.hidden_states, "attention": wanted.attentions, "values": values}
  for name, reference in references.items():
    for ours, layer in zip(out[name], reference, strict=True):
      close(ours, layer)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_towers(tmp_path, act):
  theirs = _both(hidden_act=act)
  theirs.save_pretrained(tmp_path)
  _rename(tmp_path, "", {"text_model.embeddings.position_ids": torch.arange(11)[None],
                         "vision_model.embeddings.position_ids": torch.arange(10)[None]})
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(IDS), to_torch(IMAGES))
    text = theirs.get_text_features(torch.from_numpy(IDS)).pooler_output
    image = theirs.get_image_features(to_torch(IMAGES)).pooler_output
  model = hub.load(clip.CLIPModel, tmp_path)
  ours_text, ours_image = model.encode_text(IDS)[0], model.encode_image(IMAGES)[0]
  close(ours_text, text)
  close(ours_image, image)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  close(unit(ours_image) @ unit(ours_text).T, wanted.logits_per_image / theirs.logit_scale.exp())
  close(model.logit_scale[...], theirs.logit_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_types_are_widened_exactly(tmp_path, dtype):
  theirs = _text().to(dtype)
  theirs.save_pretrained(tmp_path)
  theirs = theirs.float()
  hidden_bld, _ = hub.load(clip.CLIPTextModel, tmp_path)(IDS)
  close(hidden_bld, theirs(torch.from_numpy(IDS)).last_hidden_state)


def test_shards_of_transformers(tmp_path):
  theirs = _both()
  theirs.save_pretrained(tmp_path, max_shard_size="40KB")
  assert (tmp_path / "model.safetensors.index.json").is_file()
  wanted = theirs.get_text_features(torch.from_numpy(IDS)).pooler_output
  close(hub.load(clip.CLIPModel, tmp_path).encode_text(IDS)[0], wanted)


def test_config_of_2021_with_every_tower_twice():
  source = {"text_config": {"hidden_size": 8}, "text_config_dict": {"hidden_size": 64},
            "vision_config": {"patch_size": 16, "hidden_size": None}, "vision_config_dict": None}
  wanted = transformers.CLIPConfig(**json.loads(json.dumps(source | {"vision_config": {"patch_size": 16}})))
  ours = clip.CLIPConfig.from_json(source)
  for section in ("text_config", "vision_config"):
    for name, value in vars(getattr(ours, section)).items():
      assert value == getattr(getattr(wanted, section), name), (section, name)
  assert ours.projection_dim == wanted.projection_dim
  assert ours.logit_scale_init_value == wanted.logit_scale_init_value


@pytest.mark.parametrize("kind", ["text", "vision", "both"])
def test_transformers_opens_what_save_writes(tmp_path, kind):
  config, ours, theirs = {
      "text": (TEXT, clip.CLIPTextModel, transformers.CLIPTextModel),
      "vision": (VISION, clip.CLIPVisionModel, transformers.CLIPVisionModel),
      "both": ({"text_config": TEXT, "vision_config": VISION, "projection_dim": 20}, clip.CLIPModel,
               transformers.CLIPModel)}[kind]
  model = ours.from_json(config, rngs=nnx.Rngs(4))
  model_type = {"text": "clip_text_model", "vision": "clip_vision_model", "both": "clip"}[kind]
  hub.save(model, tmp_path, config | {"model_type": model_type}, dtype=np.float32)
  opened, report = theirs.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  if kind == "text":
    close(model(IDS)[0], opened(torch.from_numpy(IDS)).last_hidden_state)
  elif kind == "vision":
    close(model(IMAGES)[0], opened(to_torch(IMAGES)).pooler_output)
  else:
    close(model.encode_text(IDS)[0], opened.get_text_features(torch.from_numpy(IDS)).pooler_output)
    close(model.encode_image(IMAGES)[0], opened.get_image_features(to_torch(IMAGES)).pooler_output)
