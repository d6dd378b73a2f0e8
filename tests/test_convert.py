"""The converter of pickled weights where PyTorch is not needed, or absent."""

import sys

import pytest

from digzsl_jax import convert


@pytest.mark.parametrize("name, safe", [
  ("pytorch_model.bin", "model.safetensors"), ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
  ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
  ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
  ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
  ("diffusion_pytorch_model.bin.index.fp16.json", "diffusion_pytorch_model.safetensors.index.fp16.json"),
  ("training_args.bin", None), ("optimizer.pt", None), ("config.json", None), ("model.safetensors", None)])
def test_names(name, safe):
  assert convert.safe_name(name) == safe


def test_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "sd.ckpt").write_bytes(b"\x80\x04.")
  with pytest.raises(ImportError, match=r"PyTorch, which is not installed: pip install 'digzsl_jax\[oracle\]'"):
    convert.convert(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors")
  with pytest.raises(SystemExit, match="error: pickled weights are read with PyTorch"):
    convert.main([str(tmp_path / "sd.ckpt"), str(tmp_path / "sd.safetensors")])
  assert [path.name for path in tmp_path.iterdir()] == ["sd.ckpt"]


def test_what_is_refused_before_anything_is_read(tmp_path):
  folder, file = tmp_path / "model", tmp_path / "sd.ckpt"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  file.write_bytes(b"\x80\x04.")
  (tmp_path / "there.safetensors").write_bytes(b"mine")
  for source, out, message in [
      (folder, tmp_path / "new", "no pickled weights in .*model: looked for pytorch_model.bin and diffusion_pytorch"),
      (folder, folder, "is there already"), (folder, folder / "new", "is inside"),
      (file, tmp_path / "there.safetensors", "there.safetensors is there already: name a new one"),
      (file, tmp_path / "new", "a single file is one of .bin, .*and becomes one .safetensors"),
      (folder / "config.json", tmp_path / "new.safetensors", "a single file is one of .bin"),
      (tmp_path / "none", tmp_path / "new", "no file or folder .*none")]:
    with pytest.raises(ValueError, match=message):
      convert.convert(source, out)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "sd.ckpt", "there.safetensors"]
  assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
