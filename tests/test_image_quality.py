"""Stage quality: what it says is what `quality.py` says of the same images; and where Inception comes from."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digzsl_jax import checkpoint, features, files, logs, losses, quality, workspace
from digzsl_jax import main as command
from digzsl_jax.data import images, pictures, splits
from digzsl_jax.models import cdm, inception
from digzsl_jax.runs import quality as run_quality

NAMES = ("ant", "bee", "cat", "dog", "emu", "fox")
SEEN, UNSEEN = (0, 1, 3, 5), (4, 2)
WIDTH = 5  # of the pooled state


def pooled_and_embedding(images_nijc):
  mean_nc = images_nijc.mean((1, 2)) / 255
  return np.concatenate([np.ones((len(mean_nc), WIDTH)), losses.normalise(mean_nc)], axis=1)


def corners(images_nijc):
  return images_nijc[:, :2, :2].reshape(len(images_nijc), -1) / 255


FEATURES = {"clip": pooled_and_embedding, "inception": corners}


def drawn(count, seed):
  return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


def write_generated(folder, names, count, size=4):
  """PNG files and manifest; the images as `{source: {name: [count, size, size, c]}}`."""
  rng, made = np.random.default_rng(7), {}
  for source in ("learned", "plain"):
    made[source] = {name: rng.integers(0, 256, (count, size, size, 3), np.uint8) for name in names}
  paths = {source: {name: [f"{source}_{name}_{index}.png" for index in range(count)] for name in names}
           for source in made}
  folder.mkdir(parents=True)
  for source, of_source in paths.items():
    for name, of_class in of_source.items():
      for path, image_hwc in zip(of_class, made[source][name]):
        images.write_png(folder / path, image_hwc)
  files.write_json(folder / "manifest.json", {"classes": names, "images": count, "files": paths})
  return made


def make_workspace(folder, real=(5, 3), made=4):
  """`real` counts of test images by unseen class, in their order; each image's class is drawn, not sorted."""
  labels_n = np.random.default_rng(1).permutation(np.repeat(np.array(UNSEEN, np.int32), real))
  of_seen = lambda count: np.repeat(np.array(SEEN, np.int32), count)
  dataset = splits.Dataset(
      "zoo", NAMES, SEEN, UNSEEN, (5, 3), splits.LabelledImages(drawn(32, 0), of_seen(8)),
      splits.LabelledImages(drawn(8, 1), of_seen(2)), splits.LabelledImages(drawn(len(labels_n), 2), labels_n))
  log = logs.Log(folder)
  stream = lambda model: lambda images_nijc: iter(np.array_split(FEATURES[model](images_nijc[:]), 2))
  ws = types.SimpleNamespace(
      dataset=dataset, tasks=splits.tasks(dataset), log=log, folder=lambda name: folder / name,
      models=types.SimpleNamespace(clip="some/clip"),
      clip=types.SimpleNamespace(vision_model=types.SimpleNamespace(width=WIDTH)),
      extractor=lambda model: features.Extractor(stream(model), {}, None, log))
  return ws, write_generated(folder / "generate" / "test", [NAMES[label] for label in UNSEEN], made)


def settings(**changes):
  return run_quality.Settings(**{"inception": "inception.safetensors", "resize": "bilinear"} | changes)


def near(values):
  return {metric: None if value is None else pytest.approx(value, rel=1e-4) for metric, value in values.items()}


def test_numbers_are_those_of_direct_calls(tmp_path):
  ws, made = make_workspace(tmp_path)
  found = run_quality.run(settings(), ws, tmp_path)
  assert json.loads(json.dumps(found)) == found
  assert found["clip"] == "some/clip" and found["resize"] == "bilinear"
  assert found["images"] == {"real": 8, "generated": 8} and list(found["per_class"]) == ["emu", "cat"]
  real = ws.dataset.test_unseen
  unit = lambda images_nijc: pooled_and_embedding(images_nijc)[:, WIDTH:]
  for source, of_source in made.items():
    everything = np.concatenate(list(of_source.values()))
    want = quality.scores({"inception": corners(real.images_nhwc), "clip": unit(real.images_nhwc)},
                          {"inception": corners(everything), "clip": unit(everything)})
    assert set(want) == {"fid", "kid", "kid_std", "cmmd"} and found[source] == near(want)
    for label, count in zip(UNSEEN, (5, 3)):
      name, of_class = NAMES[label], real.images_nhwc[real.labels_n == label]
      assert found["per_class"][name]["images"] == {"real": count, "generated": 4} and len(of_class) == count
      kid = quality.kernel_distance(corners(of_class), corners(of_source[name])).mean
      cmmd = quality.cmmd(unit(of_class), unit(of_source[name]))
      assert found["per_class"][name][source] == near({"kid": kid, "cmmd": cmmd})
  assert found["learned"] != found["plain"]


def test_without_inception_there_is_cmmd_alone(tmp_path):
  ws, _ = make_workspace(tmp_path)
  found = run_quality.run(settings(inception=""), ws, tmp_path)
  whole = run_quality.run(settings(), ws, tmp_path)
  assert "resize" not in found and found["plain"] == {"cmmd": whole["plain"]["cmmd"]}
  assert found["per_class"]["cat"]["learned"] == {"cmmd": whole["per_class"]["cat"]["learned"]["cmmd"]}


@pytest.mark.parametrize("real, made, without", [((5, 3), 1, ("emu", "cat")), ((5, 1), 4, ("cat",))])
def test_of_a_single_image_there_is_no_kid(tmp_path, real, made, without):
  ws, _ = make_workspace(tmp_path, real, made)
  found = run_quality.run(settings(), ws, tmp_path)
  for name, of_class in found["per_class"].items():
    assert (of_class["plain"]["kid"] is None) == (name in without) and of_class["plain"]["cmmd"] >= 0
  assert found["images"]["generated"] == 2 * made and found["plain"]["fid"] > 0


def test_one_generated_image_in_all(tmp_path):
  one = {"inception": np.ones((1, 4)), "clip": np.eye(4)[:1]}
  assert run_quality.overall({"inception": np.eye(4), "clip": np.eye(4)}, one).keys() == {"cmmd"}


class Narrow(nnx.Module):
  """In place of Inception, which takes long to compile."""

  def __init__(self, path, *, resize):
    self.resize = resize
    self.gain = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32))

  def __call__(self, images_bijc):
    return images_bijc.mean((1, 2)) @ self.gain[...]


@pytest.fixture
def with_inception(tiny_config, tmp_path, monkeypatch):
  """`tiny_config` with a file for Inception, two images of each class generated, and what reads the file."""
  checkpoint.write_arrays(path := tmp_path / "inception.safetensors", {"gain": np.zeros(1)})
  tiny_config.quality.update(inception=str(path), resize="bicubic_antialias")
  monkeypatch.setattr(inception, "load", Narrow)
  return tiny_config


def new_workspace(config, folder):
  ws = workspace.Workspace(config.to_dict(), folder, logs.Log(folder))
  for name, module in command.DIG_ZSL.items():
    ws.stage(name, module.NEEDS, module.MODELS)
  return ws


def test_stage_of_a_run(with_inception, tmp_path):
  folder = tmp_path / "run"
  ws = new_workspace(with_inception, folder)
  task, size = ws.tasks["test"], 32
  names = [ws.dataset.names[label] for label in task.unseen]
  ws.stages["generate"].claim()
  made = write_generated(folder / "generate" / "test", names, 2, size)
  ws.stages["generate"].finish({"seconds": 0})
  with_inception.stages = ("quality",)
  command.METHODS["dig_zsl"](with_inception.to_dict(), folder, logs.Log(folder), False)
  found = ws.stages["quality"].results()
  assert found["resize"] == "bicubic_antialias"
  assert found["images"] == {"real": 4 * len(names), "generated": 2 * len(names)}
  encoder, real = cdm.Encoder(ws.clip, ws.model_paths["clip"]), task.test_unseen.images_nhwc
  rows = lambda images_nijc: {"inception": cdm.batched(Narrow("", resize=""), 8)(images_nijc),
                              "clip": cdm.batched(encoder)(images_nijc)[:, encoder.width:]}
  for source, of_source in made.items():
    want = quality.scores(rows(real), rows(np.concatenate(list(of_source.values()))))
    assert found[source] == {metric: pytest.approx(value, rel=1e-3, abs=1e-5) for metric, value in want.items()}


def test_inception_is_among_the_inputs(with_inception, tmp_path):
  path = with_inception.quality.inception
  first = new_workspace(with_inception, tmp_path).stages
  checkpoint.write_arrays(path, {"gain": np.ones(1)})
  second = new_workspace(with_inception, tmp_path).stages
  changed = {name for name, stage in first.items() if stage.fingerprint != second[name].fingerprint}
  assert changed == {"quality", "evaluate", "report"}
  with_inception.quality.inception = ""
  assert new_workspace(with_inception, tmp_path).model_fingerprints["inception"] is None


def test_rows_of_photographs_are_kept(with_inception, tmp_path, monkeypatch):
  for index, image_hwc in enumerate(drawn(5, 3)):
    images.write_png(tmp_path / f"{index}.png", image_hwc)
  photographs = pictures.Pictures(tmp_path, pictures.scan(tmp_path, [f"{i}.png" for i in range(5)])[0], 4)
  with_inception.cdm.cache = str(tmp_path / "cache")
  rows = new_workspace(with_inception, tmp_path).extractor("inception")(photographs)
  again = new_workspace(with_inception, tmp_path).extractor("inception")
  monkeypatch.setattr(type(again), "_shards", lambda *_: pytest.fail("encoded again"))
  np.testing.assert_array_equal(again(photographs), rows)
  with_inception.quality.resize = "bilinear"
  with pytest.raises(pytest.fail.Exception, match="encoded again"):
    new_workspace(with_inception, tmp_path).extractor("inception")(photographs)


def test_another_network_is_refused_before_the_first_stage(tiny_config, tiny_world, tmp_path):
  tiny_config.quality.inception = str(tiny_world / "clip" / "model.safetensors")
  with pytest.raises(ValueError, match="config.quality: .*model.safetensors: the weights are not those of InceptionV3"):
    command.METHODS["dig_zsl"](tiny_config.to_dict(), tmp_path, logs.Log(tmp_path), False)
  assert not list(tmp_path.iterdir())
