"""Zero-shot classifier: what it is trained on, and the stage."""

import types

import jax
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, files, logs
from digzsl_jax.data import images, splits
from digzsl_jax.models import cdm, hub
from digzsl_jax.models.classifier import Classifier
from digzsl_jax.runs import classifier as run_classifier

SETTINGS = run_classifier.Settings(features="pooled", hidden=0, images=4, steps=150, learning_rate=0.1,
                                   weight_decay=1e-4)
NAMES = ("red", "green", "blue", "yellow", "cyan")
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200]])


def paint(labels_n, rng):
  return (COLOURS[labels_n][:, None, None] + rng.integers(-20, 21, (len(labels_n), 4, 4, 3))).astype(np.uint8)


def make_task():
  rng = np.random.default_rng(0)

  def drawn(*classes_and_counts):
    labels_n = np.concatenate([np.full(count, label, np.int32) for label, count in classes_and_counts])
    return splits.LabelledImages(paint(labels_n, rng), labels_n)

  return splits.Task("test", (3, 0, 1), (4, 2), drawn((0, 12), (1, 3), (3, 6)), drawn((0, 3), (1, 3), (3, 3)),
                     drawn((2, 5), (4, 5)), drawn((2, 3), (4, 7)))


def write_generated(folder, task, rng, count=5):
  """Images of the right colour from "learned", of the other unseen class's from "plain"."""
  made = {}
  for source, labels in (("learned", task.unseen), ("plain", task.unseen[::-1])):
    made[source] = {}
    for label, shown in zip(task.unseen, labels):
      paths = [f"{source}/{NAMES[label]}/{index:05d}.png" for index in range(count)]
      (folder / source / NAMES[label]).mkdir(parents=True, exist_ok=True)
      for path, image in zip(paths, paint(np.full(count, shown), rng)):
        images.write_png(folder / path, image)
      made[source][NAMES[label]] = paths
  files.write_json(folder / "manifest.json", {"images": count, "files": made,
                                              "classes": [NAMES[label] for label in task.unseen]})


@pytest.fixture
def world(tmp_path, monkeypatch):
  """A workspace whose encoder is the mean colour, with generated images on disk."""
  task = make_task()
  features = {f"test.{field}": getattr(task, field).images_nhwc.mean((1, 2)).astype(np.float32)
              for field in ("train", "test_seen", "test_unseen", "real_unseen")}
  checkpoint.write_arrays(tmp_path / "cdm" / "features.safetensors", features)
  write_generated(tmp_path / "generate" / "test", task, np.random.default_rng(1))
  monkeypatch.setattr(cdm, "streamed", lambda *arguments: lambda images: [images[:].mean((1, 2)).astype(np.float32)])
  dataset = types.SimpleNamespace(names=NAMES, has_images=True)
  prototypes_kd = COLOURS.astype(np.float32) / np.linalg.norm(COLOURS, axis=1, keepdims=True)
  return types.SimpleNamespace(log=logs.Log(tmp_path), seed=0, tasks={"test": task}, dataset=dataset,
                               cdm_encoder=None, pooled_width=3, prototypes_kd=prototypes_kd,
                               folder=lambda name: tmp_path / name)


def test_stage_learns_from_each_source_its_own_classes(world, tmp_path):
  summary = run_classifier.run(SETTINGS, world, tmp_path / "classifier")
  fewer = {f"test_{source}_{count}" for source in ("learned", "plain") for count in (1, 2)}
  assert set(summary) == {"test_learned", "test_plain", "test_gaussian", "test_real"} | fewer
  for source, shown in (("learned", [3, 4]), ("plain", [4, 3]), ("real", [3, 4])):
    model = hub.load(Classifier, tmp_path / "classifier" / f"test_{source}")
    logits = model(COLOURS[[3, 0, 1, 4, 2]].astype(np.float32))  # columns: seen, then unseen
    assert logits.argmax(-1).tolist() == [0, 1, 2, *shown]
  for name in fewer:
    model = hub.load(Classifier, tmp_path / "classifier" / name)
    shown = [3, 4] if "learned" in name else [4, 3]
    assert model(COLOURS[[4, 2]].astype(np.float32)).argmax(-1).tolist() == shown
  config = hub.read_json(tmp_path / "classifier" / "test_real" / "config.json")
  assert config["classes"] == ["yellow", "red", "green", "cyan", "blue"]
  assert (config["seen"], config["size"]) == (3, 4)
  cached = checkpoint.read_arrays(tmp_path / "classifier" / "features.safetensors")
  assert cached["test.learned"].shape == (2, 5, 3)  # all five, although four train
  np.testing.assert_allclose(cached["test.learned"][0].mean(0), COLOURS[4], atol=10)


def test_stage_repeats_itself(world, tmp_path):
  settings = run_classifier.Settings("all", 8, 2, 10, 0.01, 0.0)
  for name in "ab":
    run_classifier.run(settings, world, tmp_path / name)
  first, second = (nnx.state(hub.load(Classifier, tmp_path / name / "test_learned")) for name in "ab")
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_damaged_image_is_named(world, tmp_path):
  path = tmp_path / "generate" / "test" / "plain" / "blue" / "00003.png"
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(ValueError, match="plain/blue/00003.png"):
    run_classifier.run(SETTINGS, world, tmp_path / "classifier")


def test_a_class_without_images_is_named(world, tmp_path):
  path = tmp_path / "generate" / "test" / "manifest.json"
  manifest = files.read_json(path)
  manifest["files"]["learned"]["cyan"].pop()
  files.write_json(path, manifest)
  with pytest.raises(ValueError, match="5 learned images of cyan"):
    run_classifier.run(SETTINGS, world, tmp_path / "classifier")


def test_few_real_images_are_repeated():
  features_nf, labels_n = np.arange(6.0)[:, None], np.array([4, 2, 4, 2, 4, 4])
  rows = run_classifier.real_images(features_nf, labels_n, (4, 2), 3)
  assert rows[..., 0].tolist() == [[0, 2, 4], [1, 3, 1]]


def test_columns_of_features():
  assert run_classifier.columns("embedding", 16, 22) == (16, 22)
  with pytest.raises(ValueError, match='use "pooled"'):
    run_classifier.columns("embedding", 16, 16)


def test_every_class_weighs_the_same():
  """A class shown ten times as often must not be preferred where features say nothing."""
  labels_n = np.array([0] * 10 + [1])
  model = Classifier((0, 2), 0, 3, rngs=nnx.Rngs(0))
  settings = run_classifier.Settings("all", 0, 4, 300, 0.1, 0.0)
  (trained,), loss_s = run_classifier.fit(model, np.zeros((11, 2), np.float32), labels_n,
                                          np.zeros((1, 1, 4, 2), np.float32), settings)
  np.testing.assert_allclose(jax.nn.softmax(trained(np.zeros((1, 2)))), 1 / 3, atol=1e-3)
  np.testing.assert_allclose(loss_s, np.log(3), atol=1e-3)
