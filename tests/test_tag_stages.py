"""TagCLIP from data to report on a tiny random model: scores, masks, counts, resume, and settings that cannot be."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from configs import quickstart_tagclip
from digzsl_jax import checkpoint, files, logs, multilabel_metrics, tagger
from digzsl_jax import main as command
from digzsl_jax.data import label_maps, multilabel, true_masks
from digzsl_jax.models import clip, hub, tagclip
from digzsl_jax.runs import evaluate_tags
from digzsl_jax.tag_workspace import TagWorkspace
from tests.conftest import random_model

METHODS = ("global", "patch", "dmar", "tagclip")


@pytest.fixture(scope="module")
def tiny_clip(tiny_world, tmp_path_factory):
  """A CLIP of three layers, whose words are those of scenes."""
  folder = tmp_path_factory.mktemp("tags") / "clip"
  shutil.copytree(tiny_world / "clip", folder)
  config = hub.read_json(folder / "config.json")
  config["vision_config"].update(num_hidden_layers=3, num_attention_heads=2)
  hub.save(random_model(clip.CLIPModel, config, seed=3), folder, config)
  return folder


@pytest.fixture
def config(tiny_clip, tmp_path):
  config = quickstart_tagclip.get_config()
  config.data.update(test=21)
  config.models.update(clip=str(tiny_clip), cache=str(tmp_path / "texts"))
  config.tags.update(first_layer=0, votes=1, pictures=1, crops=4)
  config.masks.update(first_layer=0, last_layer=2, pictures=1, pairs=4)
  config.report.examples = 2
  return config


def run(config, folder, dry_run=False):
  command.METHODS["tagclip"](config.to_dict(), folder, logs.Log(folder), dry_run)


def scores(folder):
  return checkpoint.read_arrays(folder / "tags" / "scores.safetensors")


@pytest.fixture(scope="module")
def done(tiny_clip, tmp_path_factory):
  """`(config, workdir)` of a whole run."""
  folder = tmp_path_factory.mktemp("done")
  made = config.__wrapped__(tiny_clip, folder)
  run(made, folder / "run")
  return made, folder / "run"


def test_from_data_to_report(done, capsys):
  config, folder = done
  results, dataset = files.read_json(folder / "results.json"), multilabel.load(config.data.to_dict())
  found = scores(folder)
  assert found.keys() == set(METHODS) and all(value.shape == (21, 108) for value in found.values())
  assert results["method"] == "tagclip" and results["baselines"].keys() == set(METHODS[:-1])
  for name, entry in (results["baselines"] | {"tagclip": results}).items():
    tags_nf = np.asarray(tagclip.tags(found[name], 0.5))
    counted = multilabel_metrics.tags_precision_recall_f1(tags_nf, dataset.test.targets_nk)
    assert entry["F1"] == pytest.approx(100 * counted.f1, abs=0.006) and entry["pictures"] == 21
    precisions = [value or 0 for value in entry["per_label"].values()]
    assert entry["mAP"] == pytest.approx(np.mean(precisions), abs=0.01) and len(precisions) == 108
  np.testing.assert_allclose(found["global"].sum(1), 1, rtol=1e-5)
  assert results["warnings"] == []
  page = (folder / "report.html").read_text()
  assert page.isascii() and page.count("<figure><div") == 2 and page.count('title="true masks"') == 2
  run(config, folder)
  assert "tags: already there" in capsys.readouterr().err


def test_masks_are_of_the_tags_and_counted_with_the_true_ones(done):
  config, folder = done
  results, dataset = files.read_json(folder / "results.json"), multilabel.load(config.data.to_dict())
  listed = files.read_json(folder / "masks" / "manifest.json")
  assert len(listed["masks"]) == len(listed["overlays"]) == 21
  truth, tags_nf = true_masks.open(config.data.to_dict(), dataset), np.asarray(tagclip.tags(scores(folder)["tagclip"]))
  inter, union = np.zeros(109), np.zeros(109)
  for row, path in enumerate(listed["masks"]):
    labels_hw = label_maps.read(folder / "masks" / path, np.arange(-1, 108))
    assert labels_hw.shape == (48, 48) and set(np.unique(labels_hw)) <= {-1, *np.flatnonzero(tags_nf[row])}
    assert Image.open(folder / "masks" / listed["overlays"][row]).size[0] >= 32
    for c in range(109):
      ours, true = labels_hw + 1 == c, truth[row] + 1 == c
      inter[c] += (ours & true).sum()
      union[c] += (ours | true).sum()
  assert results["mIoU"] == pytest.approx(100 * np.mean((inter / np.maximum(union, 1))[union > 0]), abs=0.01)
  nothing = results["masks"]["all_background"]["per_class"]
  share = np.mean([(truth[row] == -1).mean() for row in range(21)])
  assert nothing["background"] == pytest.approx(100 * share, abs=0.01)
  assert {value for name, value in nothing.items() if name != "background"} <= {0.0, None}
  assert (folder / "masks" / "labels.txt").read_text().splitlines()[107] == f"108 {dataset.names[107]}"


def test_an_interrupted_stage_goes_on_where_it_was(done, config, tmp_path, monkeypatch):
  config.stages, read, stream = ("tags",), [], tagger.Tagger.stream

  def interrupted(tagger, pictures, buckets):
    for count, scored in enumerate(stream(tagger, pictures, buckets)):
      yield scored
      if count == 0:
        raise KeyboardInterrupt

  def counted(tagger, pictures, buckets):
    read.extend(len(bucket.members) for bucket in buckets)
    return stream(tagger, pictures, buckets)

  monkeypatch.setattr("digzsl_jax.runs.tagclip.SAVE_SECONDS", -1)
  monkeypatch.setattr(tagger.Tagger, "stream", interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(config, tmp_path / "cut")
  monkeypatch.setattr(tagger.Tagger, "stream", counted)
  run(config, tmp_path / "cut")
  assert sum(read) == 21 - 8  # eight devices, a picture each
  whole = scores(done[1])
  for name, value in scores(tmp_path / "cut").items():
    np.testing.assert_array_equal(value, whole[name])
  assert not (tmp_path / "cut" / "tags" / "partial.safetensors").exists()


def test_masks_that_are_there_are_not_made_again(done, tmp_path):
  config, folder = done
  shutil.copytree(folder, tmp_path / "run")
  (tmp_path / "run" / "masks" / "done.json").unlink()
  first, second = (tmp_path / "run" / "masks" / "labels" / f"{row:06d}.png" for row in (0, 1))
  before = first.stat().st_mtime_ns, second.read_bytes()
  second.unlink()
  run(config, tmp_path / "run")
  assert first.stat().st_mtime_ns == before[0] and second.read_bytes() == before[1]


def test_label_texts_are_kept(done, config, tmp_path, monkeypatch):
  config.models.cache, config.stages = done[0].models.cache, ("tags",)
  monkeypatch.setattr("digzsl_jax.label_texts.encode", None)
  run(config, tmp_path / "again")


def test_difficult_objects_may_count_as_present():
  settings = evaluate_tags.Settings(difficult=True, drop_empty=True, skip_absent=True, groups="", background=True)
  targets_nf = np.array([[1, 0, -1], [0, 0, 0], [0, 1, 0]], np.int8)

  class Workspace:
    dataset = multilabel.MultilabelDataset("x", ("a", "b", "c"), (0, 1, 2), (), multilabel.Tagged(
        np.zeros((0, 4, 4, 3), np.uint8), targets_nf[:0]), multilabel.Tagged(np.zeros((3, 4, 4, 3), np.uint8),
                                                                            targets_nf))
  counted = evaluate_tags.targets(settings, Workspace)
  np.testing.assert_array_equal(counted, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
  scores_nf = np.array([[0.9, 0.1, 0.6], [1, 1, 1], [0, 0.9, 0.2]], np.float32)
  found = evaluate_tags.measure(settings, scores_nf, counted, Workspace.dataset.names, 0.5)
  assert found["pictures"] == 2 and found["mAP"] == found["F1"] == 100 and found["tags_per_picture"] == 1.5


@pytest.mark.parametrize("change, message", [
    ({"tags.votes": 4}, "config.tags: first_layer 0 and votes 4 do not fit a model of 3 layers"),
    ({"masks.last_layer": 3}, "config.masks: first_layer 0 and last_layer 3 do not fit a model of 3 layers"),
    ({"tags.threshold": 1.0}, "config.tags.threshold is 1.0; it must be at least 0 and below 1"),
    ({"models.names": "voc"}, "config.models.names is 'voc', a list of 20 names, but multilabel-scenes0 has 108"),
    ({"models.background": "cub"}, "config.models.background is 'cub'; it must be"),
    ({"models.template": "a photo of a very very very very very very very very big {name}"}, "is too long"),
    ({"evaluate.groups": "stuff27"}, "groups 171 labels, but multilabel-scenes0 has 108"),
    ({"masks.names": "dogs"}, "config.masks.names is 'dogs'; it must be")])
def test_settings_that_cannot_be_are_refused_before_anything_is_made(config, tmp_path, change, message):
  for field, value in change.items():
    section, name = field.split(".")
    config[section][name] = value
  with pytest.raises(ValueError) as error:
    run(config, tmp_path / "run")
  assert message in " ".join(str(error.value).split()) and not (tmp_path / "run" / "tags").exists()


def test_a_world_that_knows_nothing_of_the_labels_is_said_to(config, tmp_path):
  ws = TagWorkspace(config.to_dict() | {"models": config.models.to_dict() | {"clip": "embedded:fashion_mnist/clip"}},
                    tmp_path, logs.Log(tmp_path))
  assert ws.warnings and json.dumps(ws.foreign_models) == '["embedded:fashion_mnist/clip"]'
  assert jax.device_count() == 8
