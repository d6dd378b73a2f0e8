"""The evaluation of a world whose pictures are plain colours: every number of it is known beforehand."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, files, logs, losses, mesh
from digzsl_jax.data import images, splits
from digzsl_jax.models import cdm
from digzsl_jax.runs import classifier as run_classifier
from digzsl_jax.runs import evaluate

NAMES = ("red", "green", "blue", "yellow", "cyan", "pink")
COLOURS = np.array([[220, 20, 20], [20, 220, 20], [20, 20, 220], [200, 200, 20], [20, 200, 200],
                    [200, 20, 200]])
MADE = 4
QUALITY = {"learned": {"cmmd": 0.2}, "plain": {"cmmd": 0.3}}
TRAINING = run_classifier.Settings("pooled", 0, MADE, 200, 0.1, 0.0)


def paint(labels_n, seed):
  noise = np.random.default_rng(seed).integers(-15, 16, (len(labels_n), 4, 4, 3))
  return (COLOURS[labels_n][:, None, None] + noise).astype(np.uint8)


def features_of(images_nhwc):
  """A stand-in for the encoder: mean colour, and its direction as image embedding."""
  mean = images_nhwc.mean((1, 2)).astype(np.float32) / 255
  return np.concatenate([mean, losses.normalise(mean)], axis=1)


def write_generated(folder, unseen):
  """"learned" shows its class but for the last picture, "plain" the other unseen class."""
  shown = {"learned": lambda row: [unseen[row]] * (MADE - 1) + [unseen[1 - row]],
           "plain": lambda row: [unseen[1 - row]] * MADE}
  made = {source: {} for source in shown}
  for source, labels in shown.items():
    for row, label in enumerate(unseen):
      paths = [f"{source}/{NAMES[label]}/{index:05d}.png" for index in range(MADE)]
      (folder / source / NAMES[label]).mkdir(parents=True)
      for path, image in zip(paths, paint(np.array(labels(row)), label)):
        images.write_png(folder / path, image)
      made[source][NAMES[label]] = paths
  files.write_json(folder / "manifest.json", {"images": MADE, "files": made})


class ColourJudge(nnx.Module):
  def __call__(self, images_bhwc):
    mean_b1c = ((images_bhwc.mean((1, 2)) + 1) * 127.5)[:, None]
    return {"colour": -jnp.sum((mean_b1c - COLOURS) ** 2, -1)}


def make_workspace(folder, has_real=True):
  def drawn(classes, count, seed):
    labels_n = np.repeat(np.array(classes, np.int32), count)
    return splits.LabelledImages(paint(labels_n, seed), labels_n)

  seen, unseen = (0, 1, 3, 5), (4, 2)
  dataset = splits.Dataset("colours", NAMES, seen, unseen, (5, 3), drawn(seen, 8, 0), drawn(seen, 4, 1),
                           drawn(unseen, 5, 2), drawn(unseen, 6, 3) if has_real else None)
  judge = ColourJudge(), {"heads": {"colour": list(NAMES)}, "pairs": [["blue", "cyan"], ["red", "green"]]}
  prototypes_kd = np.asarray(losses.normalise(jnp.float32(COLOURS)))
  return types.SimpleNamespace(
      config={"cdm": {"encoder": "clip", "kind": "residual", "temperature": 0.05}, "generate": {"images": MADE},
              "data": {"name": "colours"}}, seed=3, workdir=folder,
      log=logs.Log(folder), judge=judge, judge_config=judge[1], dataset=dataset, tasks=splits.tasks(dataset), stages={},
      clip=types.SimpleNamespace(logit_scale=nnx.Param(jnp.float32(3))), folder=lambda name: folder / name,
      cdm_head=lambda task: folder / "cdm" / f"{task}_residual",
      models=types.SimpleNamespace(clip=str(folder)), model_names={"models.clip": "embedded:colours/clip"},
      cdm_encoder=None, pooled_width=3, prototypes_kd=prototypes_kd, text_prototypes_kd=prototypes_kd,
      mesh=mesh.make(1))


def run_stages(ws, monkeypatch):
  """Writes what the stages before `evaluate` leave, then runs it; returns what `results.json` holds."""
  monkeypatch.setattr(cdm, "streamed", lambda *arguments: lambda images: [features_of(images[:])])
  features = {}
  for name, task in ws.tasks.items():
    features |= {f"{name}.{field}": features_of(getattr(task, field).images_nhwc)
                 for field in ("train", "test_seen", "test_unseen", "real_unseen") if getattr(task, field)}
    write_generated(ws.workdir / "generate" / name, task.unseen)
    for kind in cdm.KINDS:
      cdm.save_head(cdm.Head(kind, 3, 4, 3, rngs=nnx.Rngs(0)), ws.workdir / "cdm" / f"{name}_{kind}")
  checkpoint.write_arrays(ws.workdir / "cdm" / "features.safetensors", features)
  run_classifier.run(TRAINING, ws, ws.workdir / "classifier")
  ws.stages["cdm"] = checkpoint.Stage(ws.workdir / "cdm", {})
  ws.stages["cdm"].finish({"seconds": 1.5})
  ws.stages["quality"] = checkpoint.Stage(ws.workdir / "quality", {})
  ws.stages["quality"].finish(QUALITY | {"seconds": 0.5})
  ws.stages["evaluate"] = checkpoint.Stage(ws.workdir / "evaluate", {})  # unfinished
  evaluate.run(evaluate.Settings(lambdas=21), ws, ws.workdir / "evaluate")
  return json.loads((ws.workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  with pytest.MonkeyPatch.context() as monkeypatch:
    yield run_stages(make_workspace(tmp_path_factory.mktemp("run")), monkeypatch)


def test_headline(results):
  assert results["dataset"] == "colours" and results["seed"] == 3
  assert results["classes"] == {"seen": 4, "unseen": 2}
  assert results["seconds"] == {"cdm": 1.5, "quality": 0.5}
  assert results["quality"] == QUALITY
  assert results["czsl"] == {"T1": 100, "T1_per_image": 100, "per_class": {"cyan": 100, "blue": 100}}
  assert results["gap_closed"] == 1 and results["method"] == "dig_zsl"
  assert results["baselines"]["plain_sd"]["czsl"]["T1"] == 0
  assert results["baselines"]["real_images"]["czsl"]["T1"] == 100


def test_baselines_without_generated_images(results):
  baselines = results["baselines"]
  assert set(baselines) == {"clip_zero_shot", "cdm_prototype", "cdm_prototype_mlp", "cdm_prototype_residual",
                            "plain_sd", "gaussian_features", "real_images"}
  assert baselines["clip_zero_shot"]["czsl"]["T1"] == 100
  # An untrained residual head is CLIP, and it is the kind that guides.
  assert baselines["cdm_prototype_residual"]["czsl"] == baselines["clip_zero_shot"]["czsl"]
  assert baselines["cdm_prototype"] == baselines["cdm_prototype_residual"] != baselines["cdm_prototype_mlp"]


def test_generalised_accuracies_and_where_lambda_comes_from(results):
  for entry in (results, *results["baselines"].values()):
    gzsl, oracle = entry["gzsl"], entry["gzsl_oracle"]
    assert gzsl["lambda_chosen_on"] == "validation classes" and oracle["lambda_chosen_on"] == "test (oracle)"
    assert gzsl["H"] <= oracle["H"]
    for key, classes in (("U", (4, 2)), ("S", (0, 1, 3, 5))):
      assert gzsl[key] == pytest.approx(np.mean([gzsl["per_class"][NAMES[k]] for k in classes]), abs=0.01)
  for validation, test in ((results["validation"], results), *(
      (results["validation"]["baselines"][name], entry) for name, entry in results["baselines"].items())):
    assert validation["gzsl"]["lambda"] == test["gzsl"]["lambda"]
    assert "gzsl_oracle" not in validation
  assert results["gzsl"]["H"] == 100


def test_accuracies_by_image_and_what_was_counted(results):
  counts = results["images"]
  assert counts == {"train": 32, "test_seen": 16, "test_unseen": 10, "generated_per_class": MADE}
  for entry in (results, *results["baselines"].values()):
    by_image, by_class = entry["gzsl"]["per_image"], entry["gzsl"]["per_class"]
    # Every class has as many test images as the next one here.
    assert by_image["U"] == pytest.approx(np.mean([by_class[NAMES[k]] for k in (4, 2)]), abs=0.01)
    assert by_image["S"] == pytest.approx(np.mean([by_class[NAMES[k]] for k in (0, 1, 3, 5)]), abs=0.01)


def test_checkpoints_of_another_world_are_warned_of(results, tmp_path):
  assert results["warnings"] == []
  ws = make_workspace(tmp_path)
  ws.model_names["models.sd"] = "embedded:scenes/sd"
  [warning] = evaluate.warnings(ws)
  assert warning.startswith("embedded:scenes/sd learnt from another small world") and "mean nothing" in warning


def test_lambda_curve(results):
  points = results["lambda_curve"]["learned"]
  assert [point["lambda"] for point in points] == pytest.approx(np.linspace(0, 1, 21))
  assert points[-1]["S"] == 0 and points[-1]["U"] == 100
  chosen = next(point for point in points if point["lambda"] == results["gzsl"]["lambda"])
  assert {key: results["gzsl"][key] for key in "USH"} == {key: chosen[key] for key in "USH"}
  assert len(results["lambda_curve"]["plain"]) == 21


def test_images_curve(results):
  assert results["images_curve"]["learned"] == [{"images": count, "T1": 100} for count in (1, 2, MADE)]
  assert results["images_curve"]["plain"] == [{"images": count, "T1": 0} for count in (1, 2, MADE)]


def test_judge_of_other_classes_is_refused(tmp_path):
  ws = make_workspace(tmp_path)
  evaluate.validate(None, ws)
  ws.judge[1]["heads"]["colour"].remove("cyan")
  with pytest.raises(ValueError, match="'cyan' fits 0 of them.*config.models.judge"):
    evaluate.validate(None, ws)


def test_agreement_of_generated_images(results):
  found = dict(results["generated"])
  per_class = found.pop("per_class")
  assert found == {"cdm_agreement": 75, "judge_agreement": 75, "judge_pair_agreement": 100,
                   "plain_sd_cdm_agreement": 0, "plain_sd_judge_agreement": 0,
                   "plain_sd_judge_pair_agreement": 100}
  assert per_class == {"cyan": found, "blue": found}
  validation = results["validation"]["generated"]  # pink and yellow are no pair
  assert validation["judge_pair_agreement"] == 75 and validation["plain_sd_judge_pair_agreement"] == 0
  assert set(validation["per_class"]) == {"pink", "yellow"}


def test_what_a_world_lacks_is_left_out(tmp_path, monkeypatch):
  ws = make_workspace(tmp_path, has_real=False)
  ws.judge = None
  results = run_stages(ws, monkeypatch)
  assert results["gap_closed"] is None and "real_images" not in results["baselines"]
  assert "real_images" in results["validation"]["baselines"]  # seen classes have real images
  assert set(results["generated"]) == {"cdm_agreement", "plain_sd_cdm_agreement", "per_class"}


def test_a_judge_that_does_not_know_the_class(tmp_path, monkeypatch):
  ws = make_workspace(tmp_path)
  ws.judge = ws.judge[0], {"heads": {"colour": ["red", "green"]}, "pairs": []}
  with pytest.raises(ValueError, match="the class 'cyan' fits 0 of them"):
    run_stages(ws, monkeypatch)


def test_settings():
  assert {field.name for field in dataclasses.fields(evaluate.Settings)} == {"lambdas"}
  with pytest.raises(ValueError, match="lambdas is 1"):
    evaluate.Settings(lambdas=1)
