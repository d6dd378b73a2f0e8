"""Runs on features of standard layout, and prototypes from files."""

import json

import numpy as np
import pytest
import scipy.io
from sklearn.metrics import recall_score

from configs import features as features_config
from digzsl_jax import checkpoint, logs, main, predict
from digzsl_jax.data import datasets, feature_files
from digzsl_jax.models import cdm, hub
from digzsl_jax.models.classifier import Classifier
from tests import small_archive

SEEN, UNSEEN, WIDTH, ATTRIBUTES = 24, 6, 32, 10


def planted(noise=0.5, seed=0):
  """`(att_splits, res101)` of classes whose features are a rectified linear image of their attributes."""
  rng, classes = np.random.default_rng(seed), SEEN + UNSEEN
  att = rng.normal(size=(ATTRIBUTES, classes))
  labels_n = rng.permutation(np.repeat(np.arange(classes), rng.integers(10, 31, size=classes)))  # unlike sizes
  mean_fk = rng.normal(size=(WIDTH, ATTRIBUTES)) @ att / np.linalg.norm(att, axis=0)
  features_fn = np.maximum(mean_fk[:, labels_n] + noise * rng.normal(size=(WIDTH, len(labels_n))) + 1, 0)
  numbers_n = np.arange(1, len(labels_n) + 1)
  unseen_n, held_n = labels_n >= SEEN, rng.random(len(labels_n)) < 0.25
  column = lambda mask: numbers_n[mask][:, None].astype(np.uint16)
  splits = {"att": att, "allclasses_names": small_archive.cells([f"kind_{k}" for k in range(classes)]),
            "trainval_loc": column(~unseen_n & ~held_n), "test_seen_loc": column(~unseen_n & held_n),
            "test_unseen_loc": column(unseen_n)}
  return splits, {"features": features_fn, "labels": labels_n[:, None] + 1.0}


def write(folder, splits, res101, save=scipy.io.savemat):
  return small_archive.write(folder, splits, res101, save=save)


def run(folder, workdir, **overrides):
  config = features_config.get_config()
  config.data.update(folder=str(folder), benchmark="", validation=0.25)
  config.cdm.update(hidden=64, steps=300, temperature=0.1)
  config.classifier.update(images=40, steps=200)
  config.update_from_flattened_dict(overrides)
  main.METHODS["dig_zsl"](config.to_dict(), workdir, logs.Log(workdir), False)
  return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder, workdir = write(tmp_path_factory.mktemp("archive") / "toys", *planted()), tmp_path_factory.mktemp("run")
  return folder, workdir, run(folder, workdir)


def test_planted_structure_is_recovered(finished):
  *_, results = finished
  assert results["method"] == "gaussian_features" and results["dataset"] == "toys"
  assert results["classes"] == {"seen": SEEN, "unseen": UNSEEN}
  chance = 100 / UNSEEN
  prototype = results["baselines"]["cdm_prototype_mlp"]
  for entry in (results, prototype):
    assert 3 * chance < entry["czsl"]["T1"] < 100 and entry["czsl"]["T1"] != entry["czsl"]["T1_per_image"]
    assert entry["gzsl"]["H"] > 10 * 100 / (SEEN + UNSEEN)
  assert "clip_zero_shot" not in results["baselines"] and "generated" not in results


def test_accuracies_are_scikit_learns_macro_recalls(finished):
  folder, workdir, results = finished
  splits, res101 = planted()
  labels_n, features_nf = res101["labels"].ravel().astype(int) - 1, res101["features"].T.astype(np.float32)
  held, unseen = (splits[loc].ravel().astype(int) - 1 for loc in ("test_seen_loc", "test_unseen_loc"))
  head = cdm.load_head(workdir / "cdm" / "test_mlp")
  vectors = np.asarray(head(features_nf))
  cosines_nk = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ (
      splits["att"] / np.linalg.norm(splits["att"], axis=0))
  logits = {"classifier": np.asarray(hub.load(Classifier, workdir / "classifier" / "test_gaussian")(features_nf)),
            "prototypes": cosines_nk / 0.1}
  for entry, logits_nk in ((results, logits["classifier"]),
                           (results["baselines"]["cdm_prototype_mlp"], logits["prototypes"])):
    powers_nk = np.exp(np.float64(logits_nk) - logits_nk.max(1, keepdims=True))
    scores_nk = powers_nk / powers_nk.sum(1, keepdims=True)
    macro = lambda rows, said_n: 100 * recall_score(labels_n[rows], said_n[rows], average="macro",
                                                    labels=np.unique(labels_n[rows]), zero_division=0)
    t1 = macro(unseen, SEEN + scores_nk[:, SEEN:].argmax(1))
    said_n = (scores_nk - entry["gzsl"]["lambda"] * (np.arange(SEEN + UNSEEN) < SEEN)).argmax(1)
    u, s = macro(unseen, said_n), macro(held, said_n)
    wanted = {"T1": t1, "U": u, "S": s, "H": 2 * u * s / (u + s)}
    found = entry["czsl"] | entry["gzsl"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=0.01)
    by_image = 100 * np.mean(said_n[held] == labels_n[held])
    assert entry["gzsl"]["per_image"]["S"] == pytest.approx(by_image, abs=0.01)


def test_page_of_a_run_without_images(finished):
  _, workdir, _ = finished
  text = (workdir / "report.html").read_text()
  assert "<h1>Gaussian features on toys</h1>" in text and "<img" not in text
  assert 'id="protocol"' in text and 'id="classes"' in text and 'id="pictures"' not in text


def test_prototypes_from_a_file(finished, tmp_path):
  folder, _, results = finished
  att, names = planted()[0]["att"], [f"kind {k}" for k in range(SEEN + UNSEEN)]
  shuffled = np.random.default_rng(1).permutation(len(names))
  np.savez(tmp_path / "mine.npz", names=np.array(names)[shuffled], prototypes=3 * att.T[shuffled])
  again = run(folder, tmp_path / "run", **{"models.prototypes": str(tmp_path / "mine.npz")})
  for name in ("czsl", "gzsl"):
    assert again[name] == results[name]
  with pytest.raises(ValueError, match="was made from other settings"):
    run(folder, tmp_path / "run", **{"models.prototypes": "attributes"})


def test_features_of_a_benchmark(tmp_path):
  splits, res101, lists = small_archive.contents()
  res101["features"] = np.random.default_rng(0).normal(size=(4, res101["labels"].size))
  folder = small_archive.write(tmp_path / "CUB", splits, res101, lists)
  (folder / "mine.mat").write_bytes((folder / "res101.mat").read_bytes())
  dataset = datasets.load({"name": "features", "folder": str(folder), "benchmark": "CUB", "file": "mine.mat"})
  assert not dataset.has_images and dataset.name == "cub" and dataset.names[0] == "laysan albatross"
  assert dataset.train.features_nf.shape == (len(dataset.train.labels_n), 4)
  rows = np.sort(splits["trainval_loc"].ravel()).astype(int) - 1
  np.testing.assert_array_equal(dataset.train.features_nf, res101["features"].T[rows].astype(np.float32))
  np.testing.assert_array_equal(dataset.attributes_ka, splits["att"].T)
  res101["labels"] = np.roll(res101["labels"], 1)
  small_archive.write(folder, splits, res101, lists)
  with pytest.raises(ValueError):
    datasets.load({"name": "features", "folder": str(folder), "benchmark": "CUB", "file": "mine.mat"})


def test_files_of_matlab_7_3(tmp_path):
  dataset = feature_files.load(folder=write(tmp_path / "toys", *planted(), save=small_archive.save_hdf5), validation=4)
  wanted = feature_files.load(folder=write(tmp_path / "old", *planted()), validation=4)
  np.testing.assert_array_equal(dataset.train.features_nf, wanted.train.features_nf)
  assert dataset.names == wanted.names and dataset.seen == tuple(range(SEEN)) and len(dataset.validation) == 4


@pytest.mark.parametrize(("change", "message"), [
    (lambda splits, res101: res101.update(labels=res101["labels"] - 1), "count from 0"),
    (lambda splits, res101: res101.update(features=res101["features"][:, 1:]), "a column for each of"),
    (lambda splits, res101: res101.pop("features"), "must hold the numbers features and labels"),
    (lambda splits, res101: splits.pop("test_seen_loc"), "has no numbers test_seen_loc"),
    (lambda splits, res101: splits.pop("allclasses_names"), "allclasses.txt; write a class name"),
    (lambda splits, res101: splits.update(att=splits["att"][:, 1:]), "a column for each of 30 classes"),
    (lambda splits, res101: splits.update(test_seen_loc=splits["trainval_loc"][:5]), "share 5 images"),
    (lambda splits, res101: splits.update(test_unseen_loc=splits["test_unseen_loc"] + 900), "counts .* images, but"),
    (lambda splits, res101: res101.update(features=np.where(res101["features"] > 2, np.nan, 0)), "finite float32"),
])
def test_what_does_not_fit_is_said(tmp_path, change, message):
  splits, res101 = planted()
  change(splits, res101)
  with pytest.raises(ValueError, match=message):
    feature_files.load(folder=write(tmp_path / "toys", splits, res101), validation=0.25)


def test_settings_that_features_do_not_allow(finished, tmp_path):
  folder, *_ = finished
  for overrides, message in (
      ({"stages": ("cdm", "tokens")}, r"\['tokens'\] make or compare images"),
      ({"cdm.encoder": "clip", "models.clip": "embedded:scenes/clip"}, "encoder is 'clip', but toys has features"),
      ({"data.file": "res50.mat"}, "there is no .*res50.mat"),
      ({"data.benchmark": "CUB", "data.validation": 0.5}, "validation is 0.5: the published divisions"),
      ({"models.prototypes": "words"}, "models.prototypes is 'words'"),
      ({"models.prototypes": "absent.npz"}, "absent.npz cannot be read"),
      ({"models.prototypes": "text"}, "config.models.clip")):
    with pytest.raises(ValueError, match=message):
      run(folder, tmp_path / "run", **overrides)
  assert not any(path.is_dir() for path in (tmp_path / "run").iterdir())


@pytest.mark.parametrize(("arrays", "message"), [
    ({"names": ["a"], "prototypes": np.ones((1, 3))}, "no prototype of b"),
    ({"names": ["a", "b"], "prototypes": np.ones((3, 3))}, "one row of numbers"),
    ({"names": ["a", "a"], "prototypes": np.ones((2, 3))}, "each name once"),
    ({"names": ["a", "b"], "prototypes": np.eye(2, 3, 1) * [[1], [0]]}, "zero or not finite"),
    ({"names": ["a", "b"]}, "numpy.savez"),
])
def test_prototypes_that_do_not_fit(tmp_path, arrays, message):
  np.savez(tmp_path / "mine.npz", **arrays)
  with pytest.raises(ValueError, match=message):
    feature_files.read_prototypes(tmp_path / "mine.npz", ["a", "b"])


def test_damaged_prototypes(tmp_path):
  (tmp_path / "mine.npz").write_bytes(b"PK\3\4 no archive")
  with pytest.raises(ValueError, match="mine.npz cannot be read"):
    feature_files.read_prototypes(tmp_path / "mine.npz", ["a"])


def test_new_pictures_cannot_be_classified(finished):
  _, workdir, _ = finished
  with pytest.raises(ValueError, match="was trained on features in place of images"):
    predict.load(workdir)


def test_second_start_makes_nothing(finished, capsys):
  folder, workdir, _ = finished
  before = checkpoint.fingerprint_folder(workdir / "cdm")
  run(folder, workdir)
  assert capsys.readouterr().err.count("already there") == 4
  assert checkpoint.fingerprint_folder(workdir / "cdm") == before
