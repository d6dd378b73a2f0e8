"""CLIP-Decoder from data to report on the smallest models."""

import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from configs import quickstart_clip_decoder
from digzsl_jax import base_workspace, checkpoint, files, logs, losses
from digzsl_jax import main as command
from digzsl_jax.data import multilabel, prompts
from digzsl_jax.decoder_workspace import DecoderWorkspace
from digzsl_jax.models import hub, layers, tresnet
from digzsl_jax.runs import clip_decoder


@pytest.fixture
def config(tiny_world):
  config = quickstart_clip_decoder.get_config()
  config.data.update(train=60, test=40)
  config.models.clip = str(tiny_world / "clip")
  config.train.update(width=16, heads=2, feed_forward=16, shared=8, epochs=2, batch=16)
  config.report.examples = 3
  return config


def run(config, folder, dry_run=False):
  command.METHODS["clip_decoder"](config.to_dict(), folder, logs.Log(folder), dry_run)


def workspace(config, folder):
  ws = DecoderWorkspace(config.to_dict(), folder, logs.Log(folder))
  settings = base_workspace.parse(clip_decoder.Settings, ws.config["train"], "train")
  ws.stage("train", (), clip_decoder.MODELS)
  return ws, settings


def weights(folder):
  return (folder / "train" / "weights.safetensors").read_bytes()


def test_from_data_to_report(config, tmp_path, capsys):
  run(config, tmp_path)
  results = files.read_json(tmp_path / "results.json")
  assert results["labels"] == {"seen": 96, "unseen": 12} and results["images"] == {"train": 60, "test": 40}
  for entry in (results, *results["baselines"].values()):
    for part, count in (("zsl", 12), ("gzsl", 108), ("seen", 96)):
      found = entry[part]
      assert found["labels"] == len(found["per_label"]) == count and found["images"] == 40
      assert found["mAP"] == pytest.approx(np.mean([value or 0 for value in found["per_label"].values()]), abs=0.01)
      assert {"P@3", "R@3", "F1@3", "P@5", "R@5", "F1@5"} < found.keys()
  assert results["baselines"].keys() == {"last_weights", "clip_zero_shot", "random_scores"}
  assert results["warnings"] == [] and results["training"]["updates"] == 2 * (60 // 16)
  page = (tmp_path / "report.html").read_text()
  assert page.isascii() and page.count("<figure><img") == 3 and "CLIP-Decoder on multilabel-scenes0" in page
  run(config, tmp_path)
  assert "train: already there" in capsys.readouterr().err


def test_killed_and_started_again(config, tmp_path, monkeypatch):
  config.stages, config.train.augment, config.train.labels = ("train",), True, 20
  monkeypatch.setattr(clip_decoder, "SAVE_EVERY", 2)
  run(config, tmp_path / "whole")

  class Killed(BaseException):
    pass

  replace, left = os.replace, [3]  # settings, versions, inputs come first

  def replace_or_die(source, target):
    if "state" in str(target):
      left[0] -= 1
      if not left[0]:
        raise Killed
    replace(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", replace_or_die)
    with pytest.raises(Killed):
      run(config, tmp_path / "killed")
  assert checkpoint.read_arrays(tmp_path / "killed/train/state.safetensors")[".step"] == 4
  run(config, tmp_path / "killed")
  assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_devices_share_a_batch(config, tmp_path):
  config.stages = ("train",)
  found = []
  for devices in (1, 4):
    config.mesh.devices = devices
    run(config, tmp_path / str(devices))
    found.append(checkpoint.read_arrays(tmp_path / str(devices) / "train/weights.safetensors"))
  for name, one in found[0].items():
    if name.endswith("['multihead_attn']['in_proj_bias'].value"):
      # A softmax ignores what is added to all keys: that gradient is rounding, which Adam enlarges.
      found[1][name][16:32] = one[16:32]
    np.testing.assert_allclose(found[1][name], one, atol=2e-5, err_msg=name)


def test_training_reads_nothing_of_unseen_labels(config, tmp_path, monkeypatch):
  """Whatever the targets, names and queries of unseen labels are, the same weights come out."""
  config.stages = ("train",)
  run(config, tmp_path / "told")
  dataset = DecoderWorkspace.dataset.func

  def renamed(ws):
    found = dataset(ws)
    unseen = list(found.unseen)
    found.train.targets_nk[:, unseen] = 1
    names = [f"nothing {k}" if k in unseen else name for k, name in enumerate(found.names)]
    object.__setattr__(found, "names", tuple(names))
    return found

  changed = property(lambda ws: ws.__dict__.setdefault("renamed", renamed(ws)) if "renamed" not in ws.__dict__
                     else ws.__dict__["renamed"])
  monkeypatch.setattr(DecoderWorkspace, "dataset", changed)
  run(config, tmp_path / "changed")
  assert weights(tmp_path / "told") == weights(tmp_path / "changed")


def test_captions_name_seen_labels_that_fit(config, tmp_path):
  ws, _ = workspace(config, tmp_path)
  names, fits = list(ws.dataset.names[:3]), lambda text: len(text) < 60
  assert prompts.caption("a photo of", ["sky"], fits) == "a photo of sky"
  assert prompts.caption("a photo of", ["sky", "car", "road"], fits) == "a photo of sky, car and road"
  assert prompts.caption("a photo of", ["sky", "x" * 50], fits) == "a photo of sky"
  assert prompts.caption("", ["x" * 80, "sky"], fits) == "x" * 80
  embeds_nx = ws.caption_embeds(np.array([[1, 0, 0], [0, -1, 0], [1, 0, 0], [0, 1, 1]], np.int8), names, "a photo of")
  np.testing.assert_allclose(np.linalg.norm(embeds_nx, axis=1), [1, 0, 1, 1], atol=1e-6)
  np.testing.assert_array_equal(embeds_nx[0], embeds_nx[2])
  [want_x] = ws.embed_texts([f"a photo of {names[0]}"], "")
  np.testing.assert_allclose(embeds_nx[0], want_x, atol=1e-6)


def test_pairs_that_do_not_count():
  rng = np.random.default_rng(0)
  images_bd, texts_bd = rng.normal(size=(2, 5, 4)).astype(np.float32)
  counted_b = np.array([True, False, True, True, False])
  value = lambda x: losses.clip(x, texts_bd, 3.0, counted_b)[0]
  want, accuracy = losses.clip(images_bd[counted_b], texts_bd[counted_b], 3.0)
  assert float(value(images_bd)) == pytest.approx(float(want), abs=1e-6)
  assert losses.clip(images_bd, texts_bd, 3.0, counted_b)[1] == pytest.approx(float(accuracy))
  grads_bd = jax.grad(value)(images_bd)
  assert np.isfinite(grads_bd).all() and not grads_bd[~counted_b].any() and grads_bd[counted_b].any()
  assert losses.clip(images_bd, texts_bd, 3.0, np.zeros(5, bool))[0] == 0


def test_labels_of_an_update():
  data = clip_decoder.Data(None, np.arange(4), np.zeros((4, 9), np.int8), None, None, False)
  targets_bk = np.zeros((2, 9), np.int8)
  targets_bk[0, [1, 7]], targets_bk[1, 4] = 1, 1
  drawn = [data.columns(5, targets_bk, (0, step)) for step in range(20)]
  for columns in drawn:
    assert len(columns) == len(set(columns)) == 5 and {1, 4, 7} <= set(columns)
  assert len({tuple(columns) for columns in drawn}) > 5
  assert data.columns(0, targets_bk, (0, 0)) is None and data.columns(9, targets_bk, (0, 0)) is None
  assert set(data.columns(2, targets_bk, (0, 0))) < {1, 4, 7}


@pytest.mark.parametrize("encoder, frozen", [("clip", False), ("M", False), ("M", True)])
def test_encoders(encoder, frozen, config, tmp_path, monkeypatch):
  monkeypatch.setitem(clip_decoder.tresnet.VARIANTS, "M", {"layers": (1, 1, 1, 1), "width": 8,
                                                           "bottleneck": (False, False, True, True)})
  config.stages, config.data.size = ("train", "evaluate"), 64 if encoder == "M" else 32
  config.train.update(encoder=encoder, train_encoder=not frozen, epochs=1)
  run(config, tmp_path)
  arrays = checkpoint.read_arrays(tmp_path / "train" / "weights.safetensors")
  assert any("encoder" in name for name in arrays) == (not frozen or encoder == "M")  # statistics count
  ws, settings = workspace(config, tmp_path)
  graphdef, params, statistics, _ = nnx.split(ws.new_decoder(), ws.trained, nnx.BatchStat, ...)
  found = checkpoint.load_state(tmp_path / "train" / "weights.safetensors",
                                {name: (params, statistics) for name in ("raw", "average")})
  moved = lambda old, new: [not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (old, new)))]
  trunk = [any(moved(old["encoder"], new["encoder"])) for old, new in zip((params, statistics), found["raw"])
           if "encoder" in old]
  assert trunk == ([True] if encoder == "clip" else [False] if frozen else [True, True])


def test_weights_of_another_tresnet(config, tmp_path, monkeypatch):
  for name, blocks in (("M", 1), ("L", 2)):
    fields = {"layers": (1, blocks, 1, 1), "bottleneck": (False, False, True, True), "width": 8}
    monkeypatch.setitem(tresnet.VARIANTS, name, fields)
  model = layers.initialised(lambda: tresnet.TResNet.from_json(fields, rngs=nnx.Rngs(0)))
  hub.save(model, tmp_path / "l", fields | {"model_type": "tresnet"}, dtype=np.float32)
  config.models.tresnet, config.train.encoder = str(tmp_path / "l"), "L"
  assert workspace(config, tmp_path / "run")[0].new_encoder().width == 256
  config.train.encoder = "M"
  with pytest.raises(ValueError, match=r"config.train.encoder is 'M', but config.models.tresnet.* holds TResNet-L"):
    workspace(config, tmp_path / "run")[0].new_encoder()


def test_a_decoder_of_a_closed_list(config, tmp_path):
  config.train.groups = 10
  run(config, tmp_path)
  results = files.read_json(tmp_path / "results.json")
  assert "zsl" not in results and results["seen"]["labels"] == 96 and results["seen"]["mAP"] > 0
  assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("change, message", [
  ({"train.batch": 20}, r"config.train: batch is 20, which 8 devices cannot share"),
  ({"train.batch": 64}, r"config.train: batch is 64, but there are 60 training images"),
  ({"train.heads": 3}, r"config.train.heads is 3; it must be a divisor of width 16"),
  ({"train.encoder": "S"}, r"config.train.encoder is 'S'; it must be one of \('clip', 'features', 'M', 'L', 'XL'\)"),
  ({"train.encoder": "features"}, r"config.train: encoder is 'features', but multilabel-scenes0 has images"),
  ({"train.alpha": 0.0, "train.beta": 0.0}, r"config.train.beta is 0.0; it must be above 0"),
  ({"train.groups": 4, "train.labels": 5}, r"config.train.labels is 5; it must be 0 with groups"),
  ({"models.tresnet": "none.safetensors"}, r"config.models.tresnet is 'none.safetensors', but there is no such file"),
  ({"models.queries": "words"}, r"config.models.queries is 'words'; it must be one of"),
  ({"models.queries": "none.npz"}, r"none.npz cannot be read"),
  ({"models.clip": ""}, r"config.models.clip is empty"),
  ({"models.template": "a photo"}, r"config.models.template is \"a photo\""),
  ({"evaluate.top": (0,)}, r"config.evaluate.top is \(0,\)"),
  ({"data.max_objects": 5}, r"max_objects is 5"),
  ({"data.test": 1}, r"config.evaluate: no test image .* holds one of the 12 labels that 'zsl' ranks"),
])
def test_impossible_settings_make_nothing(change, message, config, tmp_path):
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_loss_that_diverges(config, tmp_path):
  config.stages, config.train.learning_rate = ("train",), 1e30
  with pytest.raises(ValueError, match="the loss is nan after 6 updates; lower config.train.learning_rate"):
    run(config, tmp_path)


@pytest.mark.parametrize("frozen", (True, False))
def test_dry_run(frozen, config, tmp_path, capsys):
  config.train.train_encoder = not frozen
  run(config, tmp_path, dry_run=True)
  said = capsys.readouterr().out
  assert "  update: " in said and "decoder.head" in said
  assert not list(tmp_path.iterdir())


def test_word_vectors_and_random_queries(config, tmp_path):
  ws, _ = workspace(config, tmp_path / "text")
  np.savez(tmp_path / "words.npz", names=ws.dataset.names, prototypes=np.eye(108, 7, dtype=np.float32) + 0.1)
  for queries, width in (("text", 64), ("random", 64), (str(tmp_path / "words.npz"), 7)):
    config.models.queries = queries
    vectors_kw = workspace(config, tmp_path / str(width))[0].query_vectors_kw
    assert vectors_kw.shape == (108, width)
    np.testing.assert_allclose((vectors_kw**2).mean(1), 1, atol=1e-5)
  assert json.loads(json.dumps(workspace(config, tmp_path / "x")[0].model_fingerprints["queries"]))


@pytest.fixture
def features(tmp_path):
  """A folder of made-up features of four seen labels and one unseen, in which each label has its own direction."""
  rng, folder = np.random.default_rng(0), tmp_path / "features"
  folder.mkdir()
  (folder / "names.txt").write_text("sea\nsand\ndog\ntram\nstar\n")
  (folder / "unseen.txt").write_text("star\n")
  for part, count in (("train", 40), ("test", 30)):
    targets_nk = (rng.random((count, 5)) < 0.4).astype(np.int8)
    noise_nte = rng.normal(size=(count, 3, 8))
    np.save(folder / f"{part}.npy", (noise_nte + 3 * targets_nk[:, None] @ np.eye(5, 8)).astype(np.float16))
    np.save(folder / f"{part}_targets.npy", targets_nk)
  return folder


def test_features_in_place_of_images(config, features, tmp_path):
  with config.unlocked():
    config.data = dict(name="features", folder=str(features))
  config.train.update(encoder="features", epochs=30, batch=8, learning_rate=0.02)
  config.mesh.devices = 1
  run(config, tmp_path / "run")
  results = files.read_json(tmp_path / "run" / "results.json")
  assert results["baselines"].keys() == {"last_weights", "random_scores"}
  assert results["seen"]["mAP"] > results["baselines"]["random_scores"]["seen"]["mAP"] + 20
  page = (tmp_path / "run" / "report.html").read_text()
  assert "CLIP zero-shot" not in page and "Pictures and their tags" not in page


@pytest.mark.parametrize("spoil, message", [
  (lambda folder: (folder / "test.npy").unlink(), r"there is no .*test.npy; numpy.save writes it"),
  (lambda folder: (folder / "train.npy").write_bytes(b"text"), r"train.npy is no array of numpy"),
  (lambda folder: np.save(folder / "test.npy", np.zeros((30, 3, 9), np.float32)), r"train.npy, but \[3, 9\]"),
  (lambda folder: np.save(folder / "train.npy", np.zeros((40, 3, 8), np.uint8)), r"train.npy is uint8 \[40, 3, 8\]"),
  (lambda folder: np.save(folder / "test_targets.npy", np.zeros((29, 5), np.int8)), r"must be int8 \[30, 5\]"),
  (lambda folder: (folder / "unseen.txt").write_text("stars"), r"unseen.txt: no image has the label 'stars'"),
])
def test_features_that_cannot_be_read(spoil, message, features):
  assert multilabel.load({"name": "features", "folder": str(features)}).unseen == (4,)
  spoil(features)
  with pytest.raises(ValueError, match=message):
    multilabel.load({"name": "features", "folder": str(features)})


def test_features_are_told_apart(features):
  section = {"name": "features", "folder": str(features)}
  before = multilabel.fingerprint(multilabel.load(section))
  assert before == multilabel.fingerprint(multilabel.load(section))
  np.save(features / "test.npy", np.load(features / "test.npy") + 1)
  assert before != multilabel.fingerprint(multilabel.load(section))


def test_images_without_a_seen_label_are_dropped(config, features, tmp_path):
  targets_nk = np.load(features / "train_targets.npy")
  targets_nk[::2, :4] = 0
  np.save(features / "train_targets.npy", targets_nk)
  with config.unlocked():
    config.data = dict(name="features", folder=str(features))
  config.train.update(encoder="features", drop_empty=True, batch=8)
  ws, settings = workspace(config, tmp_path / "run")
  data = clip_decoder.prepare(settings, ws, ws.new_decoder())
  kept_n = np.flatnonzero(targets_nk[:, :4].any(1))
  assert 0 < len(kept_n) <= 20
  batch, queries_kw = data.batch(settings, 0, 0)
  assert len(queries_kw) == 4 and batch.targets.any(1).all() and (batch.captions != 0).any(1).all()
  rows_b = kept_n[clip_decoder.batches.rows(len(kept_n), 8, 0, 0)]
  np.testing.assert_array_equal(batch.images, np.load(features / "train.npy")[rows_b].astype(np.float32))
  np.testing.assert_array_equal(batch.targets, targets_nk[rows_b, :4])


def test_small_updates_count_in_bfloat16(config, tmp_path):
  config.models.dtype, config.train.learning_rate = "bfloat16", 1e-6
  config.stages = ("train", "evaluate")
  run(config, tmp_path)
  ws, _ = workspace(config, tmp_path / "new")
  _, params, statistics, _ = nnx.split(ws.new_decoder(), ws.trained, nnx.BatchStat, ...)
  found = checkpoint.load_state(tmp_path / "train" / "weights.safetensors",
                                {name: (params, statistics) for name in ("raw", "average")})["raw"][0]
  kernel, first = (np.asarray(state["head"]["embed_standart"]["kernel"][...]) for state in (found, params))
  assert first.dtype == "bfloat16" and kernel.dtype == np.float32
  moved = kernel - first.astype(np.float32)
  assert 0 < np.abs(moved).max() < 1e-4 and (moved != 0).mean() > 0.5  # a ReLU may keep some still
  assert files.read_json(tmp_path / "results.json")["zsl"]["mAP"] > 0
