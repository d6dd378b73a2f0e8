"""New pictures: they get the probabilities that the run's own evaluation gives them; mistakes are named."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from digzsl_jax import checkpoint, files, logs, metrics, predict
from digzsl_jax import main as command
from digzsl_jax.data import images
from digzsl_jax.models import download, hub
from digzsl_jax.runs import class_tokens, evaluate, generate
from digzsl_jax.workspace import Workspace

CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox")
UNSEEN = ("emu", "fox")
SIZE = 16


def draw_zoo(root):
  """Photographs of classes that differ in colour: JPEG and PNG, wide and tall, RGB, grey and CMYK, turned by EXIF."""
  for k, name in enumerate(CLASSES):
    (root / name).mkdir(parents=True)
    for i in range(6):
      rng = np.random.default_rng((k, i))
      pixels = rng.integers(0, 80, (40 - 3 * i, 22 + 3 * i, 3)) + np.random.default_rng(k).integers(0, 170, 3)
      picture = Image.fromarray(pixels.astype(np.uint8)).convert(("RGB", "RGB", "L", "CMYK", "RGB", "RGB")[i])
      exif = Image.Exif()
      exif[0x0112] = 6 if i == 4 else 1
      picture.save(root / name / f"{i}.{'png' if i in (1, 2) else 'jpg'}", exif=exif)
  (root / "unseen.txt").write_text("\n".join(UNSEEN))


def paint(settings, ws, folder):
  """In place of stage generate: other noise in other colours for either source."""
  for name, task in ws.tasks.items():
    made = {}
    for number, source in enumerate(("learned", "plain")):
      made[source] = {}
      for label in task.unseen:
        rng = np.random.default_rng((number, label))
        pixels_nhwc = rng.integers(0, 120, (2, 32, 32, 3)) + rng.integers(0, 130, 3)
        paths = [f"{source}/{label}-{i}.png" for i in range(2)]
        for path, pixels_hwc in zip(paths, pixels_nhwc):
          images.write_png(folder / name / path, pixels_hwc.astype(np.uint8))
        made[source][ws.dataset.names[label]] = paths
    files.write_json(folder / name / "manifest.json", {"images": 2, "files": made})


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
  """`(workdir, folder of the photographs)` of a run whose tokens and generated images alone are made up."""
  from configs import quickstart
  root = tmp_path_factory.mktemp("predict")
  draw_zoo(root / "zoo")
  config = quickstart.get_config()
  with config.unlocked():
    config.data = dict(name="folder", folder=str(root / "zoo"), size=SIZE, validation=1)
  config.models.update(clip=shutil.copytree(tiny_world / "clip", root / "clip").as_posix(), sd=str(tiny_world / "sd"),
                       judge="")
  config.cdm.update(hidden=16, steps=20, batch=8, cache="")
  config.generate.images = 2
  config.classifier.update(images=2, steps=30)
  config.stages = ("cdm", "tokens", "generate", "classifier", "quality", "evaluate")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(class_tokens, "run", lambda *arguments: {})
    patch.setattr(generate, "run", paint)
    command.METHODS["dig_zsl"](config.to_dict(), root / "run", logs.Log(root / "run"), False)
  return root / "run", root / "zoo"


@pytest.fixture(scope="module")
def evaluated(run):
  """`(paths of test pictures, what stage evaluate makes of them)`."""
  workdir, zoo = run
  ws = Workspace(files.read_json(workdir / "config.json"), workdir, logs.Log(workdir))
  for name, module in command.DIG_ZSL.items():
    ws.stage(name, module.NEEDS, module.MODELS)
  task = ws.tasks["test"]
  features = evaluate.test_features(checkpoint.read_arrays(workdir / "cdm" / "features.safetensors"), task.name)
  scores = evaluate.read_scores(ws, task, features, features)
  return [zoo / file.path for part in (task.test_seen, task.test_unseen) for file in part.images_nhwc.files], scores


@pytest.fixture
def ask(run, capsys):
  """`ask(arguments...)`: exit status, what is printed, and the lines of mistakes."""
  def answer(*arguments, workdir=run[0]):
    capsys.readouterr()
    status = predict.main([f"--workdir={workdir}", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()
  return answer


@pytest.fixture
def refused(ask):
  """`refused(arguments...)`: the message that ends the program."""
  def answer(*arguments, **others):
    with pytest.raises(SystemExit) as stop:
      ask(*arguments, **others)
    return stop.value.code
  return answer


@pytest.fixture
def batches_of_the_run(monkeypatch):
  """As large as stage cdm has them, for equal bits: XLA sums in another order where a batch has another size."""
  streamed = predict.cdm.streamed
  monkeypatch.setattr(predict.cdm, "streamed", lambda encoder, batch: streamed(encoder, predict.BATCH))


@pytest.mark.parametrize("source", ["learned", "plain"])
def test_photographs_get_the_probabilities_of_the_evaluation(source, evaluated, run, ask, batches_of_the_run):
  (paths, scores), results = evaluated, files.read_json(run[0] / "results.json")
  method = evaluate.METHODS[source]
  lam = (results if source == "learned" else results["baselines"][method])["gzsl"]["lambda"]
  status, out, wrong = ask(*paths, "--json", f"--source={source}", "--top=99")
  found = json.loads(out)
  assert status == 0 and not wrong and [entry["file"] for entry in found] == list(map(str, paths))
  for entry, expected_k in zip(found, scores.probabilities_nk[method]):
    by_name = {each["class"]: each for each in entry["top"]}
    np.testing.assert_array_equal([by_name[name]["probability"] for name in scores.names_k], expected_k)
    assert [by_name[name]["seen"] for name in scores.names_k] == scores.is_seen_k.tolist()
    score = [each["score"] for each in entry["top"]]
    assert score == [each["probability"] - lam * each["seen"] for each in entry["top"]]
    assert score == sorted(score, reverse=True)
  said = [scores.names_k.index(entry["top"][0]["class"]) for entry in found]
  assert said == metrics.calibrated_predictions(scores.probabilities_nk[method], scores.is_seen_k, lam).tolist()


def test_label_spaces_and_lambda(evaluated, ask, batches_of_the_run):
  paths, scores = evaluated
  probabilities_nk = scores.probabilities_nk["dig_zsl"]
  for among, columns in (("unseen", np.flatnonzero(~scores.is_seen_k)), ("seen", np.flatnonzero(scores.is_seen_k))):
    found = json.loads(ask(*paths, "--json", f"--among={among}")[1])
    said_n = metrics.restricted_predictions(probabilities_nk, columns)
    assert [entry["top"][0]["class"] for entry in found] == [scores.names_k[k] for k in said_n]
    for entry, row_k in zip(found, probabilities_nk[:, columns]):
      assert all(each["score"] == each["probability"] for each in entry["top"])
      np.testing.assert_allclose(entry["top"][0]["probability"], row_k.max() / row_k.sum(), atol=1e-12)
      assert sum(each["probability"] for each in entry["top"]) == pytest.approx(1)
  for lam in (0, 0.5, 1):
    said_n = metrics.calibrated_predictions(probabilities_nk, scores.is_seen_k, lam)
    found = json.loads(ask(*paths, "--json", f"--lam={lam}")[1])
    assert [entry["top"][0]["class"] for entry in found] == [scores.names_k[k] for k in said_n]


def test_one_picture_is_a_small_batch(evaluated, ask, monkeypatch):
  paths, scores = evaluated
  asked = []
  streamed = predict.cdm.streamed
  monkeypatch.setattr(predict.cdm, "streamed", lambda encoder, batch: asked.append(batch) or streamed(encoder, batch))
  [entry] = json.loads(ask(paths[0], "--json", "--lam=0")[1])
  assert entry["top"][0]["probability"] == pytest.approx(scores.probabilities_nk["dig_zsl"][0].max(), abs=1e-5)
  ask(*paths[:5])
  assert asked == [1, 8]


def test_table_of_a_folder(run, ask):
  status, out, wrong = ask(run[1] / "emu", run[1] / "ant" / "0.jpg", "--top=2", "--lam=0.5")
  heading, *lines = out.splitlines()
  assert status == 0 and not wrong and heading.split() == ["probability", "score", "class"]
  assert lines[::3] == [str(run[1] / name) for name in (
      *(f"emu/{i}.{'png' if i in (1, 2) else 'jpg'}" for i in range(6)), "ant/0.jpg")]
  for line in (line for row, line in enumerate(lines) if row % 3):
    probability, score, name, *unseen = line.split()
    assert (name in UNSEEN) == (unseen == ["(unseen)"])
    assert float(probability) - float(score) == pytest.approx(0 if unseen else 0.5, abs=1.1e-4)


def test_damaged_pictures_are_named_and_the_others_done(run, ask, tmp_path):
  shutil.copytree(run[1] / "emu", tmp_path / "emu")
  whole = (tmp_path / "emu" / "0.jpg").read_bytes()
  (tmp_path / "emu" / "0.jpg").write_bytes(whole[:len(whole) // 2])
  (tmp_path / "notes.txt").write_text("no picture")
  assert ask(tmp_path / "notes.txt")[:2] == (1, "")
  status, out, wrong = ask(tmp_path / "emu", tmp_path / "notes.txt", "--json")
  assert status == 1
  assert [line.split(" cannot be read (")[0] for line in wrong] == [
      f"error: {tmp_path / name}" for name in ("emu/0.jpg", "notes.txt")]
  assert "Truncated File Read" in wrong[0] and "it is no picture" in wrong[1]
  kept = json.loads(out)
  assert [entry["file"] for entry in kept] == [str(path) for path in sorted((tmp_path / "emu").iterdir())[1:]]
  alone = json.loads(ask(kept[0]["file"], "--json")[1])[0]["top"]
  assert [each["class"] for each in alone] == [each["class"] for each in kept[0]["top"]]
  np.testing.assert_allclose([each["score"] for each in alone], [each["score"] for each in kept[0]["top"]], atol=1e-5)


def test_wrong_commands(run, refused, tmp_path):
  picture = run[1] / "emu" / "0.jpg"
  assert refused(tmp_path / "none.jpg").startswith(f"error: there is no file or folder {tmp_path}/none.jpg")
  assert f"the folder {tmp_path} holds no pictures (.bmp, " in refused(tmp_path)
  assert "--lam is 1.5; it must be from 0 to 1" in refused(picture, "--lam=1.5")
  assert "--among is 'seen'; it must be all with --lam" in refused(picture, "--lam=0.5", "--among=seen")
  assert "'real'; its data set allows --source=gaussian, learned, plain" in refused(picture, "--source=real")
  assert f"{tmp_path} holds no run: it has no config.json" in refused(picture, workdir=tmp_path)
  files.write_json(tmp_path / "config.json", {"method": "pretrain"})
  assert "belongs to a run of config.method 'pretrain'" in refused(picture, workdir=tmp_path)


@pytest.fixture
def copied(run, tmp_path):
  shutil.copytree(run[0], tmp_path / "run")
  return tmp_path / "run"


@pytest.mark.parametrize("absent, stage", [
    ("results.json", "evaluate"), ("evaluate/done.json", "evaluate"), ("classifier", "classifier")])
def test_a_run_that_is_not_finished(absent, stage, copied, run, refused):
  shutil.rmtree(copied / absent) if stage == absent else (copied / absent).unlink()
  assert f"the run in {copied} has not finished stage {stage}; give its" in refused(run[1] / "emu", workdir=copied)


def test_files_that_do_not_belong_together(copied, run, refused):
  path = copied / "classifier" / "test_learned" / "config.json"
  stored = hub.read_json(path)
  files.write_json(path, {field: value for field, value in stored.items() if field not in ("seen", "size")})
  assert f"{path} lacks ['seen', 'size'], which older versions" in refused(run[1] / "emu", workdir=copied)
  inputs = files.read_json(copied / "classifier" / "inputs.json")
  files.write_json(copied / "classifier" / "inputs.json", inputs | {"seed": 5})
  assert f"delete {copied}/evaluate and run stage evaluate again" in refused(run[1] / "emu", workdir=copied)


def test_an_encoder_that_moved_or_changed(copied, run, ask, refused, tmp_path):
  config = files.read_json(copied / "config.json")

  def name(folder):
    files.write_json(copied / "config.json", config | {"models": config["models"] | {"clip": str(folder)}})

  name(tmp_path / "moved")
  message = f"error: {copied}/config.json: config.models.clip is '{tmp_path}/moved', but there is no folder"
  assert refused(run[1] / "emu", workdir=copied).startswith(message)
  shutil.copytree(config["models"]["clip"], tmp_path / "moved")
  assert ask(run[1] / "emu", workdir=copied)[0] == 0
  weights = checkpoint.read_arrays(tmp_path / "moved" / "model.safetensors")
  checkpoint.write_arrays(tmp_path / "moved" / "model.safetensors", weights | {
      "logit_scale": weights["logit_scale"] + 1})
  assert f"{tmp_path}/moved, config.models.clip of {copied}/config.json, is not what the" in refused(
      run[1] / "emu", workdir=copied)


def test_an_encoder_of_its_own(copied, run, ask, refused, tmp_path):
  """The run's CLIP under the name of another encoder: the same table."""
  expected = ask(run[1] / "emu")
  config = files.read_json(copied / "config.json")
  folder = shutil.copytree(config["models"]["clip"], tmp_path / "encoder")
  cdm = config["cdm"] | {"encoder": str(folder), "kind": "mlp"}
  files.write_json(copied / "config.json", config | {"cdm": cdm, "models": config["models"] | {"clip": "gone"}})
  record, measured = copied / "classifier" / "inputs.json", copied / "evaluate" / "inputs.json"
  names = download.files(folder, download.ENCODER)
  inputs = files.read_json(record)
  inputs["models"] = {"clip": {"files": "others"}, "encoder": checkpoint.fingerprint_files(folder, names)}
  files.write_json(record, inputs)
  stages = files.read_json(measured)["stages"] | {"classifier": checkpoint.fingerprint(inputs)}
  files.write_json(measured, {"stages": stages})
  assert ask(run[1] / "emu", workdir=copied) == expected
  shutil.rmtree(folder)
  assert f"config.cdm.encoder is '{folder}', but there is no" in refused(run[1] / "emu", workdir=copied)
