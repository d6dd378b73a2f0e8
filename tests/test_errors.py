"""What a person does wrong is answered by one message that names the field, file or class."""

import dataclasses
import shutil

import numpy as np
import pytest
import safetensors.numpy

from digzsl_jax import checkpoint, files, logs
from digzsl_jax import main as command
from digzsl_jax.base_workspace import parse
from digzsl_jax.data import datasets, fashion_mnist, images
from digzsl_jax.runs import class_tokens, pretrain
from digzsl_jax.workspace import Workspace


def run(config, folder, *stages):
  config.stages = stages
  command.METHODS["dig_zsl"](config.to_dict(), folder, logs.Log(folder), False)


def token_settings(**changes):
  from configs import quickstart
  return parse(class_tokens.Settings, quickstart.get_config().tokens.to_dict() | changes, "tokens")


@pytest.mark.parametrize("changes, message", [
    ({"vectors": 0}, "config.tokens.vectors is 0; it must be at least 1"),
    ({"steps": 0}, "config.tokens.steps is 0; it must be at least 1"),
    ({"stepps": 3}, r"config.tokens: unknown fields \['stepps'\]"),
    ({"gradient": "first"}, "config.tokens.gradient is 'first'; it must be 'last' or 'x0'"),
    ({"gradient": "x0", "grad_calls": 2}, "grad_calls is 2"),
    ({"images": 3, "grad_images": 2}, "grad_images is 2; it must be 0 or a divisor of images"),
    ({"gradient": "x0", "sampler": "pndm"}, "config.tokens.sampler is 'pndm'; it must be 'ddim' for the gradient path"),
    ({"template": "a photo of {name}"}, 'config.tokens.template "a photo of {name}" must contain'),
])
def test_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    token_settings(**changes)


def test_grad_calls_beyond_the_sampler(tiny_world):
  from digzsl_jax import diffusion
  from digzsl_jax.models import hub
  schedule = diffusion.Schedule.from_config(hub.read_json(tiny_world / "sd" / "scheduler" / "scheduler_config.json"))
  settings = token_settings(gradient="last", sampler="ddim", steps=4, grad_calls=5)
  with pytest.raises(ValueError, match="grad_calls is 5; it must be at most 4, the calls that ddim makes"):
    class_tokens.gradient_path(settings, schedule)


def test_tokens_are_not_learnt_through_new_noise(tiny_world):
  from digzsl_jax.models import stable_diffusion
  schedule = stable_diffusion.load_schedule(tiny_world / "sd")
  for kind in ("euler_ancestral", "lcm", "dpm++_sde"):
    with pytest.raises(ValueError, match=rf"sampler is '{kind.replace('+', '.')}'; it must be one that draws no new"):
      class_tokens.gradient_path(token_settings(gradient="last", sampler=kind, steps=4), schedule)
  assert class_tokens.gradient_path(token_settings(gradient="last", sampler="euler", steps=4), schedule).cut == 3


def test_missing_data_folder(tmp_path):
  with pytest.raises(ValueError, match=f"{tmp_path}/none"):
    fashion_mnist.load(folder=str(tmp_path / "none"))


def test_class_in_both_lists():
  dataset = datasets.load({"name": "scenes", "train_per_class": 4, "test_per_class": 1})
  twice = dataset.seen[0]
  with pytest.raises(ValueError, match=dataset.names[twice]):
    dataclasses.replace(dataset, unseen=(*dataset.unseen, twice))


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "model.safetensors"),
    (lambda path: change(path, lambda tensors: tensors.pop("logit_scale")), "logit_scale"),
    (lambda path: change(path, lambda tensors: tensors.update(extra=np.zeros(3, np.float32))), "extra"),
    (lambda path: path.unlink(), "clip"),
])
def test_damaged_checkpoint(damage, message, tiny_world, tiny_config, tmp_path):
  shutil.copytree(tiny_world / "clip", tmp_path / "clip")
  damage(tmp_path / "clip" / "model.safetensors")
  tiny_config.models.clip = str(tmp_path / "clip")
  with pytest.raises(ValueError, match=message):
    run(tiny_config, tmp_path / "run", "cdm")


def change(path, edit):
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def test_image_that_does_not_decode(tmp_path):
  (tmp_path / "00001.png").write_bytes(b"\x89PNG but no more")
  with pytest.raises(ValueError, match="00001.png"):
    images.read_png(tmp_path / "00001.png")


def test_unknown_section_stage_and_missing_checkpoint(tiny_config, tmp_path):
  config = tiny_config.to_dict()
  with pytest.raises(ValueError, match=r"unknown or lacks sections \['token'\]"):
    command.METHODS["dig_zsl"](config | {"token": {}}, tmp_path, logs.Log(tmp_path), False)
  with pytest.raises(ValueError, match=r"config.stages: \['cdn'\] unknown"):
    command.METHODS["dig_zsl"](config | {"stages": ("cdn",)}, tmp_path, logs.Log(tmp_path), False)
  for stages, lacking in ((("tokens",), "cdm"), (("cdm", "generate"), "tokens")):
    with pytest.raises(ValueError, match=f"stage {lacking} has not finished"):
      run(tiny_config, tmp_path, *stages)
    assert not list(tmp_path.iterdir())
  for section, field, others in (("models", "sd", {}), ("cdm", "encoder", {"kind": "mlp"}), ("generate", "unet", {})):
    wrong = {section: config[section] | others | {field: "nowhere"}}
    with pytest.raises(ValueError, match=f"config.{section}.{field} is 'nowhere', but there is no folder"):
      command.METHODS["dig_zsl"](config | wrong, tmp_path, logs.Log(tmp_path), False)


@pytest.mark.parametrize("section, field, message", [
    ("corpora", None, r"config has unknown or lacks sections \['corpora'\]"),
    ("corpus", "mixups", r"config.corpus has unknown or lacks fields \['mixups'\]"),
    ("vae", "kll", r"config.vae has unknown or lacks fields \['kll'\]")])
def test_unknown_field_of_pretraining(section, field, message, tiny_pretraining, tmp_path):
  config = tiny_pretraining.to_dict()
  config.setdefault(section, {})[field] = 1
  with pytest.raises(ValueError, match=message):
    pretrain.run(config, tmp_path, logs.Log(tmp_path), False)
  config = tiny_pretraining.to_dict()
  config["clip"]["training"]["rate"] = 1
  with pytest.raises(ValueError, match=r"config.clip.training: unknown fields \['rate'\]"):
    pretrain.run(config, tmp_path, logs.Log(tmp_path), False)
  assert not list(tmp_path.iterdir())


def test_workdir_of_another_method(tmp_path):
  files.write_json(tmp_path / "config.json", {"method": "pretrain"})
  checkpoint.check_method(tmp_path, "pretrain")
  with pytest.raises(ValueError, match="belongs to a run of config.method 'pretrain', not 'dig_zsl'"):
    checkpoint.check_method(tmp_path, "dig_zsl")


def test_impossible_settings_of_later_stages_are_found_first(tiny_config, tmp_path):
  def refused(message):
    with pytest.raises(ValueError, match=message):
      run(tiny_config, tmp_path, "cdm", "tokens", "generate", "classifier")
    assert not list(tmp_path.rglob("*.safetensors"))

  for section, field, wrong, message in [
      ("mesh", "devices", 99, "config.mesh.devices is 99"),
      ("tokens", "initial", "crimsonishly", "config.tokens: the initialiser 'crimsonishly' is"),
      ("generate", "sampler", "heun", "config.generate: .*'heun' is not supported"),
      ("generate", "unet", "embedded:scenes/sd/unet", "config.generate: the denoiser .* has cross_attention_dim=64"),
      ("tokens", "vectors", 99, "config.tokens: {token} of .*: shorten the template or take fewer vectors"),
      ("tokens", "initial_file", "nowhere", "config.tokens.initial_file is 'nowhere', but there is no such file"),
      ("quality", "resize", "nearest", "config.quality.resize is 'nearest'; it must be one of .'bilinear', "),
      ("quality", "inception", "nowhere", "config.quality.inception: no safetensors file nowhere .*digzsl_jax.convert"),
      ("classifier", "images", 99, "config.classifier: images is 99, but config.generate.images is 2"),
      ("data", "train_per_class", -1, "config.data.train_per_class is -1"),
      ("data", "world", -1, "config.data: ")]:
    right = tiny_config[section][field]
    tiny_config[section][field] = wrong
    refused(message)
    tiny_config[section][field] = right


def test_files_that_no_token_can_start_from(tiny_config, tmp_path):
  def write(**tokens):
    checkpoint.write_arrays(tmp_path / "start", {name: np.ones(shape, np.float32) for name, shape in tokens.items()})

  tiny_config.tokens.initial_file = str(tmp_path / "start")
  write(star=(3, 32))
  message = "start has 3 vectors for 'plain crimson circle', but config.tokens.vectors is 1"
  with pytest.raises(ValueError, match=f"config.tokens: .*{message}"):
    run(tiny_config, tmp_path / "run", "cdm", "tokens")
  assert not list((tmp_path / "run").rglob("*.safetensors"))
  ws = Workspace(tiny_config.to_dict(), tmp_path, logs.Log(tmp_path))
  for tokens, message in [
      ({"star": (768,)}, "start: token 'star' is 768 wide .Stable Diffusion 1.x., but the text tower 32;"),
      ({"plain crimson circle": (32,)}, "start has no vectors for the classes .'plain crimson square', "),
      ({"star": (32,), "ring": (32,)}, "'.; give a file of one token, or .* It holds .'ring', 'star'"),
      ({"clip_l": (32,)}, "start holds .'clip_l'.: vectors for the two text towers")]:
    write(**tokens)
    with pytest.raises(ValueError, match=message):
      ws.file_starts()


def test_a_failed_attempt_does_not_claim_its_folder(tiny_config, tiny_world, tmp_path):
  shutil.copytree(tiny_world / "clip", tmp_path / "clip")
  tiny_config.models.clip = str(tmp_path / "clip")
  whole = (tmp_path / "clip" / "model.safetensors").read_bytes()
  (tmp_path / "clip" / "model.safetensors").write_bytes(whole[:-100])
  with pytest.raises(ValueError, match="download it again"):
    run(tiny_config, tmp_path / "run", "cdm")
  (tmp_path / "clip" / "model.safetensors").write_bytes(whole)
  run(tiny_config, tmp_path / "run", "cdm")
  config = (tmp_path / "run" / "config.json").read_bytes()
  tiny_config.cdm.steps = 3
  with pytest.raises(ValueError, match="cdm.steps: 20 -> 3"):
    run(tiny_config, tmp_path / "run", "cdm")
  assert (tmp_path / "run" / "config.json").read_bytes() == config


def test_full_disk_keeps_what_is_finished(tiny_config, tmp_path, monkeypatch):
  run(tiny_config, tmp_path, "cdm")
  done = (tmp_path / "cdm" / "done.json").read_bytes()

  def full(source, target):
    raise OSError(28, "No space left on device")
  monkeypatch.setattr("os.replace", full)
  with pytest.raises(OSError, match=r"could not write .*No space left on device.*choose another --workdir"):
    run(tiny_config, tmp_path, "tokens")
  assert (tmp_path / "cdm" / "done.json").read_bytes() == done
  assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
