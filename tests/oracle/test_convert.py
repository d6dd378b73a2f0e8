"""The converter on files that PyTorch, diffusers and transformers write."""

import json
import os
import sys
import types

import jax
import numpy as np
import pytest
import safetensors
import safetensors.torch
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from digzsl_jax import convert
from digzsl_jax.models import clip, hub, vae

TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
            max_position_embeddings=6, eos_token_id=19, bos_token_id=18)
VAE = dict(block_out_channels=(8,), norm_num_groups=4)


def same(folder, state):
  """A converted folder's file holds exactly `state`."""
  [file] = folder.glob("*.safetensors")
  tensors = safetensors.torch.load_file(file)
  assert tensors.keys() == state.keys()
  for name in state:
    assert tensors[name].dtype == state[name].dtype and torch.equal(tensors[name], state[name])


@pytest.fixture
def folder(tmp_path):
  """A diffusers folder of pickled weights, as they were published once, and its modules."""
  source = tmp_path / "source"
  text, autoencoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), diffusers.AutoencoderKL(**VAE)
  autoencoder.save_pretrained(source / "vae", safe_serialization=False)
  text.config.save_pretrained(source / "text_encoder")
  torch.save(text.state_dict(), source / "text_encoder" / "pytorch_model.bin")
  torch.save({"betas": 1}, source / "text_encoder" / "training_args.bin")
  (source / "tokenizer").mkdir()
  (source / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
  (source / "model_index.json").write_text("{}")
  (source / "README.md").write_text("words")
  assert (source / "vae" / "diffusion_pytorch_model.bin").is_file()
  return source, text, autoencoder


def test_whole_diffusers_folder(folder, tmp_path, capsys):
  source, text, autoencoder = folder
  convert.main([str(source), str(tmp_path / "out")])
  files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
  assert files == ["model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors",
                   "tokenizer/merges.txt", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
  assert "training_args.bin: left out, no weights go by that name" in capsys.readouterr().out
  same(tmp_path / "out" / "text_encoder", text.state_dict())
  same(tmp_path / "out" / "vae", autoencoder.state_dict())
  hub.load(clip.CLIPTextModel, tmp_path / "out" / "text_encoder")
  diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
  with pytest.raises(SystemExit, match="out is there already"):
    convert.main([str(source), str(tmp_path / "out")])


def test_shards(tmp_path):
  model, source = diffusers.AutoencoderKL(**VAE), tmp_path / "source"
  model.save_pretrained(source, safe_serialization=False, max_shard_size="8KB")
  assert len(list(source.glob("*.bin"))) > 1
  convert.convert(source, tmp_path / "out")
  model.save_pretrained(tmp_path / "safe")
  ours, want = (nnx.state(hub.load(vae.AutoencoderKL, tmp_path / name)) for name in ("out", "safe"))
  jax.tree.map(np.testing.assert_array_equal, ours, want)


def test_safetensors_beside_pickles_are_kept(folder, tmp_path):
  source, _, autoencoder = folder
  autoencoder.save_pretrained(source / "vae")
  lines = []
  convert.convert(source, tmp_path / "out", lines.append)
  assert any("diffusion_pytorch_model.safetensors is beside it" in line for line in lines)
  same(tmp_path / "out" / "vae", autoencoder.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_single_file_with_more_than_tensors(tmp_path, zipped, monkeypatch):
  """As PyTorch Lightning wrote them: weights in `state_dict`, some of them shared, and its own state beside it."""
  checkpoint = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
  checkpoint.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": checkpoint.__name__})
  for name in "pytorch_lightning", "pytorch_lightning.callbacks":
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, checkpoint.__name__, checkpoint)
  whole = torch.arange(12.).reshape(3, 4)
  state = {"whole": whole, "same": whole, "row": whole[1], "turned": whole.T, "half": whole.half(),
           "steps": torch.tensor(5)}
  stored = {"state_dict": state | {"note": "words"}, "epoch": 3,
            "callbacks": {checkpoint.ModelCheckpoint: {"best": np.float64(0.5)}}}
  torch.save(stored, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=zipped)
  for name in "pytorch_lightning", "pytorch_lightning.callbacks", checkpoint.__name__:
    monkeypatch.delitem(sys.modules, name)
  lines = []
  convert.convert(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors", lines.append)
  assert lines[0] == "sd.ckpt: left out, being no tensors: note"
  stored = safetensors.torch.load_file(tmp_path / "sd.safetensors")
  assert stored.keys() == state.keys()
  for name, tensor in state.items():
    assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
  with safetensors.safe_open(tmp_path / "sd.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_single_file_with_the_weights_as_model(tmp_path):
  torch.save({"model": {"x": torch.ones(2)}, "epoch": 3}, tmp_path / "tresnet.pth")
  convert.convert(tmp_path / "tresnet.pth", tmp_path / "tresnet.safetensors", say=lambda line: None)
  assert safetensors.torch.load_file(tmp_path / "tresnet.safetensors").keys() == {"x"}


class Malicious:
  def __init__(self, file):
    self.file = file

  def __reduce__(self):
    return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_are_refused(folder, tmp_path, zipped):
  source, text, _ = folder
  trace, wicked = tmp_path / "trace", source / "text_encoder" / "pytorch_model.bin"
  torch.save(text.state_dict() | {"x": Malicious(trace)}, wicked, _use_new_zipfile_serialization=zipped)
  with pytest.raises(ValueError, match="pytorch_model.bin asks for .*system.*nothing of it was run"):
    convert.convert(source, tmp_path / "out")
  with pytest.raises(SystemExit, match="nothing of it was run"):
    convert.main([str(wicked), str(tmp_path / "out.safetensors")])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
  torch.load(wicked, weights_only=False)  # it would have worked
  assert trace.exists()


def test_damaged_and_foreign_files(folder, tmp_path):
  source, text, _ = folder
  file, out = source / "text_encoder" / "pytorch_model.bin", tmp_path / "out.safetensors"

  def refused(message):
    with pytest.raises(ValueError, match=message):
      convert.convert(file, out)
    assert not out.exists()

  whole = file.read_bytes()
  for content in whole[:-200], whole[:3], b"", b"version https://git-lfs.github.com/spec/v1\n":
    file.write_bytes(content)
    refused("pytorch_model.bin .*(damaged|asks)")
  torch.save([torch.zeros(2)], file)
  refused("holds no tensors by name, but a list")
  torch.save({"name": "words"}, file)
  refused("holds no tensors by name, but a dict")
  torch.jit.script(torch.nn.Linear(2, 2)).save(file)
  refused("TorchScript archive")
  torch.save(text, file)
  refused("asks for .*nothing of it was run")


def test_index_names_safetensors(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
  for n, name in enumerate(names):
    torch.save({f"t{n}": torch.zeros(2)}, source / name)
  index = {"metadata": {"total_size": 16}, "weight_map": {"t0": names[0], "t1": names[1]}}
  (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  convert.convert(source, tmp_path / "out")
  assert set(hub.read_tensors(tmp_path / "out")) == {"t0", "t1"}
