"""Category discrimination model: preprocessing, heads, files, and the stage that trains it."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, losses
from digzsl_jax.data import splits
from digzsl_jax.models import cdm, clip, hub, vit
from digzsl_jax.runs import cdm as run_cdm

TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
CLIP_CONFIG = {"text_config": dict(TOWER, vocab_size=8, max_position_embeddings=4, eos_token_id=7),
               "vision_config": dict(TOWER, image_size=8, patch_size=4), "projection_dim": 6}
VIT_CONFIG = dict(TOWER, image_size=8, patch_size=4)
SETTINGS = run_cdm.Settings(encoder="clip", kind="residual", hidden=16, temperature=0.05, steps=60, batch=32,
                            learning_rate=1e-2, weight_decay=0.01, cache="")


@functools.cache  # eager initialisation is slow
def make_clip():
  return clip.CLIPModel.from_json(CLIP_CONFIG, rngs=nnx.Rngs(0))


def make_dataset():
  """Five classes of plainly coloured 8x8 images."""
  colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200]])
  rng = np.random.default_rng(0)

  def images(classes, count):
    labels_n = np.repeat(np.array(classes, np.int32), count)
    noise = rng.integers(-25, 26, (len(labels_n), 8, 8, 3))
    return splits.LabelledImages((colours[labels_n][:, None, None] + noise).astype(np.uint8), labels_n)

  seen, unseen = (0, 1, 3), (2, 4)
  names = ("red", "green", "blue", "yellow", "cyan")
  return splits.Dataset("toy", names, seen, unseen, (3,), train=images(seen, 16), test_seen=images(seen, 4),
                        test_unseen=images(unseen, 4), real_unseen=images(unseen, 6))


def make_workspace(folder, dataset):
  """What a stage reads of a Workspace, with random prototypes."""
  said = types.SimpleNamespace(say=lambda text: None, metrics=lambda *args, **scalars: None)
  encoder = cdm.Encoder(make_clip(), folder)
  prototypes_kd = np.random.default_rng(1).normal(size=(len(dataset.names), 6)).astype(np.float32)
  return types.SimpleNamespace(
      dataset=dataset, tasks=splits.tasks(dataset), clip=make_clip(), log=said, seed=0, workdir=folder,
      cdm_encoder=encoder, extractor=lambda model: cdm.batched(encoder), pooled_width=encoder.width,
      models=types.SimpleNamespace(prototypes="text"),
      prototypes_kd=prototypes_kd / np.linalg.norm(prototypes_kd, axis=1, keepdims=True))


def test_preprocess_leaves_fitting_images_as_they_are():
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  np.testing.assert_array_equal(cdm.Preprocess(8)(images), images)


def test_preprocess_resizes_crops_and_normalises(tmp_path):
  config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2.0]}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  preprocess = cdm.Preprocess.from_folder(tmp_path, 8)
  out = preprocess(jnp.full((1, 20, 30, 3), 0.2))  # 0.6 of [0, 1]
  assert out.shape == (1, 8, 8, 3)
  np.testing.assert_allclose(out[0, 3, 3], [1.0, 1.6, 0.15], rtol=1e-5)
  marked = jnp.zeros((1, 8, 12, 3)).at[0, 0, 2].set(1)  # 2 columns go on either side
  assert cdm.Preprocess(8)(marked)[0, 0, 0, 0] == 1


@pytest.mark.parametrize("config", [{"image_std": [1.0, 0.0, 1.0]}, {"image_mean": 0.5}, {"image_mean": [1]}])
def test_damaged_preprocessing_is_named(tmp_path, config):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  with pytest.raises(hub.CheckpointError, match="preprocessor_config.json"):
    cdm.Preprocess.from_folder(tmp_path, 8)


@pytest.mark.parametrize("stored, sizes", [
    ({"size": {"shortest_edge": 12}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}, (8, 12)),
    ({"size": {"height": 12, "width": 12}}, (12, 12)),
    ({"size": 12, "crop_size": 8, "do_center_crop": False}, (12, 12))])
def test_a_model_of_any_size_takes_that_of_its_folder(tmp_path, stored, sizes):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
  preprocess = cdm.Preprocess.from_folder(tmp_path, None)
  assert (preprocess.size, preprocess.shortest) == sizes
  out = preprocess(jnp.broadcast_to(jnp.arange(24.0)[:, None, None], (1, 24, 36, 3)))
  assert out.shape == (1, sizes[0], sizes[0], 3)
  top = (sizes[1] - sizes[0]) // 2  # the first row that is left of twelve, each the mean of two
  np.testing.assert_allclose(out[0, 2:-2, 3, 0], 0.5 + 2 * (top + np.arange(sizes[0]))[2:-2], atol=1e-3)


@pytest.mark.parametrize("stored, message", [
    (None, "no preprocessor_config.json"), ({}, "size is None"), ({"size": {"longest_edge": "8"}}, "size is"),
    ({"size": {}}, "size is"),
    ({"size": 8, "crop_size": 12, "do_center_crop": True}, "crop_size 12 is more than size 8")])
def test_a_model_of_any_size_needs_that_of_its_folder(tmp_path, stored, message):
  if stored is not None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
  with pytest.raises(hub.CheckpointError, match=message):
    cdm.Preprocess.from_folder(tmp_path, None)


def test_folder_of_no_encoder_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(hub.CheckpointError, match="config.json: model_type 'bert' .* clip, dinov2, siglip"):
    cdm.load_encoder(tmp_path, None, None)


def test_clip_features_hold_pooled_state_and_unit_embedding(tmp_path):
  model, images = make_clip(), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  features = cdm.Encoder(model, tmp_path)(images)
  assert features.shape == (2, 16 + 6)
  np.testing.assert_allclose(features[:, :16], model.vision_model(images)[0], rtol=1e-6)
  np.testing.assert_allclose(features[:, 16:], losses.normalise(model.encode_image(images)[0]), rtol=1e-5)


def test_untrained_residual_head_is_zero_shot_clip():
  features = jax.random.normal(jax.random.key(0), (3, 22))
  head = cdm.Head("residual", 16, 32, 6, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(head(features), features[:, 16:])


def test_zero_shot_is_clip(tmp_path):
  model, images = make_clip(), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  np.testing.assert_allclose(cdm.zero_shot(model, tmp_path)(images), losses.normalise(model.encode_image(images)[0]),
                             rtol=1e-5)


def test_residual_head_needs_clip(tmp_path):
  encoder = cdm.Encoder(vit.ViT.from_json(VIT_CONFIG, rngs=nnx.Rngs(0)), tmp_path)
  with pytest.raises(ValueError, match='use kind "mlp"'):
    cdm.CDM(encoder, cdm.Head("residual", 16, 32, 6, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="width 17"):
    cdm.CDM(encoder, cdm.Head("mlp", 17, 32, 6, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="kind"):
    run_cdm.Settings("some/encoder", "residual", 16, 0.05, 1, 1, 1e-3, 0.0, "")


def test_gradient_reaches_the_pixels(tmp_path):
  model = cdm.CDM(cdm.Encoder(make_clip(), tmp_path), cdm.Head("mlp", 16, 32, 6, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  images = jax.random.normal(jax.random.key(0), (1, 12, 10, 3))
  gradient = jax.jit(jax.grad(lambda images: nnx.merge(graphdef, params)(images).sum()))(images)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("is_clip", [True, False])
def test_saved_head_loads_with_its_encoder(tmp_path, is_clip):
  if is_clip:
    encoder = cdm.load_encoder("clip", make_clip(), tmp_path)
  else:
    hub.save(vit.ViT.from_json(VIT_CONFIG, rngs=nnx.Rngs(3)), tmp_path / "vit", VIT_CONFIG, dtype=np.float32)
    encoder = cdm.load_encoder(str(tmp_path / "vit"), None, tmp_path)
  head = cdm.Head("residual" if is_clip else "mlp", encoder.width, 32, 6, rngs=nnx.Rngs(1))
  head.fc2.kernel[...] = jax.random.normal(jax.random.key(0), head.fc2.kernel.shape)
  cdm.save_head(head, tmp_path / "head")
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  np.testing.assert_array_equal(cdm.load(encoder, tmp_path / "head")(images), cdm.CDM(encoder, head)(images))


def test_encoding_does_not_depend_on_the_batch(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  encoder = cdm.Encoder(make_clip(), tmp_path)
  whole = cdm.batched(encoder, batch=8)(images)
  np.testing.assert_allclose(cdm.batched(encoder, batch=2)(images), whole, atol=1e-6)
  np.testing.assert_allclose(encoder(images / np.float32(127.5) - 1), whole, atol=1e-6)


def test_a_large_batch_is_encoded_in_parts(tmp_path):
  count, encoder = 2 * cdm.PART * jax.local_device_count(), cdm.Encoder(make_clip(), tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
  for batch in 2 * cdm.PART, 2 * cdm.PART + 1:  # in two parts, and at once
    rows_nf = cdm.batched(encoder, batch)(images)
    np.testing.assert_allclose(rows_nf, encoder(images / np.float32(127.5) - 1), atol=1e-6)


def test_images_shown_twice_are_encoded_once():
  encoded, known, features, tasks = [], {}, {}, splits.tasks(make_dataset())

  def encode(images_nhwc):
    encoded.extend(images_nhwc)
    return images_nhwc.mean((1, 2))

  for name in ("test", "validation"):
    features |= run_cdm.encode_task(encode, tasks[name], known)
  assert len(encoded) == len(known) == 48 + 12 + 8 + 12
  images = tasks["validation"].real_unseen.images_nhwc
  np.testing.assert_array_equal(features["validation.real_unseen"], images.mean((1, 2)))


def test_stage_trains_both_heads_and_repeats_itself(tmp_path):
  ws = make_workspace(tmp_path, make_dataset())
  summary = run_cdm.run(SETTINGS, ws, tmp_path / "a")
  assert set(summary) == {f"{task}_{kind}" for task in ("test", "validation") for kind in cdm.KINDS}
  assert all(entry["seen_accuracy"] > 90 for entry in summary.values())  # plain colours
  assert run_cdm.run(SETTINGS, ws, tmp_path / "b") == summary
  first, second = (cdm.load_head(tmp_path / name / "test_mlp") for name in "ab")
  jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))
  features = checkpoint.read_arrays(tmp_path / "a" / "features.safetensors")
  assert features["test.real_unseen"].shape == (12, 22)


def test_training_sees_only_the_seen_classes_of_the_task(tmp_path):
  dataset = make_dataset()
  ws, other = make_workspace(tmp_path, dataset), make_workspace(tmp_path, dataset)
  other.prototypes_kd[list(dataset.unseen)] *= -1
  other.prototypes_kd[3] *= -1  # the validation class: unseen in the validation task, seen in the test task
  first, second = (run_cdm.run(SETTINGS, w, tmp_path / str(id(w))) for w in (ws, other))
  assert first["validation_mlp"] == second["validation_mlp"] and first["test_mlp"] != second["test_mlp"]
