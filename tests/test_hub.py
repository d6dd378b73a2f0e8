"""Strict reading and atomic writing of model folders, without PyTorch."""

import json
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from digzsl_jax.models import clip, hub, layers

CONFIG = {"width": 4}


class Tiny(nnx.Module):
  """Every kind of parameter that the library's models have, in lists too."""

  def __init__(self, width, *, dtype, rngs):
    self.conv = layers.conv(3, width, 3, dtype=dtype, rngs=rngs)
    self.attn = layers.Attention(width, 6, 2, bias=False, dtype=dtype, rngs=rngs)
    self.norms = nnx.List([layers.group_norm(width, 2, 1e-5, dtype=dtype, rngs=rngs),
                           nnx.BatchNorm(width, rngs=rngs)])
    self.embedding = layers.embedding(5, width, dtype=dtype, rngs=rngs)
    # A bare parameter keeps its name, even one like a layer's.
    self.scale = layers.parameter(nnx.initializers.constant(2), (), rngs=rngs)

  @classmethod
  def from_json(cls, config, *, wide=False, dtype=jnp.float32, rngs):
    if config.get("width", 4) < 0:
      raise ValueError("width must be positive")
    return cls(config["width"] * (2 if wide else 1), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(name):
    return None if name == "position_ids" else name.removeprefix("old.")


@pytest.fixture
def saved(tmp_path):
  model = Tiny.from_json(CONFIG, rngs=nnx.Rngs(1))
  model.norms[1].mean[...] = jnp.arange(4.0)
  hub.save(model, tmp_path, CONFIG, dtype=np.float32)
  return model, tmp_path


def _edit(folder, change):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


def _same(first, second):
  first, second = nnx.state(first), nnx.state(second)
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_names_and_axes_are_those_of_torch(saved):
  model, folder = saved
  tensors = hub.read_tensors(folder)
  assert {name: tensor.shape for name, tensor in tensors.items()} == {
      "conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "attn.to_q.weight": (4, 4), "attn.to_k.weight": (4, 6),
      "attn.to_v.weight": (4, 6), "attn.to_out.0.weight": (4, 4), "attn.to_out.0.bias": (4,),
      "norms.0.weight": (4,), "norms.0.bias": (4,), "norms.1.weight": (4,), "norms.1.bias": (4,),
      "norms.1.running_mean": (4,), "norms.1.running_var": (4,), "embedding.weight": (5, 4), "scale": ()}
  np.testing.assert_array_equal(tensors["attn.to_k.weight"], model.attn.to_k.kernel[...].T)
  np.testing.assert_array_equal(tensors["conv.weight"][2, 1], model.conv.kernel[:, :, 1, 2])
  np.testing.assert_array_equal(tensors["norms.1.running_mean"], np.arange(4))
  with safetensors.safe_open(folder / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_abstract_is_the_model_without_weights():
  model = hub.abstract(Tiny, CONFIG, wide=True)
  wanted = nnx.eval_shape(lambda: Tiny.from_json(CONFIG, wide=True, rngs=nnx.Rngs(0)))
  assert nnx.graphdef(model) == nnx.graphdef(wanted)
  shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(made)) for made in (model, wanted)]
  assert shapes[0] == shapes[1]
  model.norms.pop()  # no layer of ours: it makes its statistics
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


def test_round_trip_fills_every_parameter(saved):
  model, folder = saved
  _same(hub.load(Tiny, folder), model)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_stored_types_become_float32(saved, dtype):
  model, folder = saved
  hub.save(model, folder, CONFIG, dtype=dtype)
  assert {tensor.dtype for tensor in hub.read_tensors(folder).values()} == {np.dtype(dtype)}
  loaded = hub.load(Tiny, folder)
  assert loaded.conv.kernel.dtype == jnp.float32
  np.testing.assert_array_equal(loaded.conv.kernel[...], np.asarray(model.conv.kernel[...]).astype(dtype))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [jnp.float16, jnp.bfloat16])
def test_each_parameter_keeps_its_own_type(saved, stored, wanted):
  model, folder = saved
  hub.save(model, folder, CONFIG, dtype=stored)
  loaded = hub.abstract(Tiny, CONFIG)
  loaded.conv.kernel = nnx.Param(jax.ShapeDtypeStruct(loaded.conv.kernel.shape, wanted))
  hub.fill(loaded, hub.read_tensors(folder), source=folder)
  assert loaded.conv.kernel.dtype == wanted and loaded.conv.bias.dtype == jnp.float32
  np.testing.assert_array_equal(loaded.conv.kernel[...], np.asarray(model.conv.kernel[...], stored).astype(wanted))


def test_switches_reach_the_constructor(saved):
  _, folder = saved
  with pytest.raises(hub.CheckpointError, match=r"conv.weight is \(4, 3, 3, 3\), wanted \(8, 3, 3, 3\)"):
    hub.load(Tiny, folder, wide=True)


@pytest.mark.parametrize("shape", [(3, 3, 40, 1100), (1, 1, 300, 700), (700, 600), (1, 7), (7, 1), (5,), ()])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_kernels_larger_than_a_tile(shape, dtype):
  kernel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 1000
  stored = np.ascontiguousarray(hub._to_torch(kernel)) if kernel.ndim > 1 else kernel
  copy = hub._copy(hub._to_flax(stored) if kernel.ndim > 1 else stored, np.dtype(dtype))
  np.testing.assert_array_equal(copy, kernel.astype(dtype))
  assert copy.dtype == dtype and copy.flags.c_contiguous and copy.ctypes.data % 64 == 0
  assert not np.shares_memory(copy, stored)


class Watched(dict):
  """Tensors that are made when they are asked for, as those of a file are; counts those in use at once."""

  alive = most = 0

  def __getitem__(self, key):
    tensor = super().__getitem__(key).copy()
    self.alive += 1
    self.most = max(self.most, self.alive)
    weakref.finalize(tensor, self.dropped)
    return tensor

  def dropped(self):
    self.alive -= 1


def test_one_copy_of_the_weights(saved, monkeypatch):
  model, folder = saved
  monkeypatch.setattr(hub, "_THREADS", 1)
  tensors = Watched(hub.read_tensors(folder))
  _same(hub.fill(hub.abstract(Tiny, CONFIG), tensors, source=folder), model)
  assert (tensors.most, tensors.alive) == (1, 0)


def test_nothing_of_a_loaded_model_depends_on_its_file(saved):
  model, folder = saved
  loaded, file = hub.load(Tiny, folder), folder / "model.safetensors"
  file.write_bytes(bytes(file.stat().st_size))  # in place
  _same(loaded, model)


def test_shapes_are_checked_before_data_is_read(saved, monkeypatch):
  _, folder = saved
  _edit(folder, lambda tensors: tensors.update(scale=np.zeros(2, np.float32)))
  monkeypatch.setattr(hub, "_copy", lambda *_: pytest.fail("data were read"))
  with pytest.raises(hub.CheckpointError, match=r"scale is \(2,\), wanted \(\)"):
    hub.load(Tiny, folder)


def test_a_tensor_of_no_known_type(saved):
  _, folder = saved
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
  with pytest.raises(hub.CheckpointError, match="conv.weight is of type int32, wanted a floating type"):
    hub.load(Tiny, folder)
  file.write_bytes(file.read_bytes().replace(b'"I32"', b'"U32"'))
  with pytest.raises(hub.CheckpointError, match="model.safetensors holds tensors of type U32; known are F64, F32"):
    hub.load(Tiny, folder)


def test_git_lfs_pointer_is_told_apart(saved):
  _, folder = saved
  (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  with pytest.raises(hub.CheckpointError, match="model.safetensors is a Git LFS pointer.*git lfs pull"):
    hub.load(Tiny, folder)


def test_one_error_lists_every_name(saved):
  _, folder = saved

  def change(tensors):
    del tensors["scale"], tensors["conv.bias"]
    tensors |= {"extra.weight": np.zeros(2, np.float32), "old.norms.0.bias": tensors["norms.0.bias"],
                "position_ids": np.arange(3), "attn.to_k.weight": tensors["attn.to_k.weight"].T.copy(),
                "norms.1.bias": np.zeros(4, np.int32)}

  _edit(folder, change)
  with pytest.raises(hub.CheckpointError) as error:
    hub.load(Tiny, folder)
  message = str(error.value)
  assert str(folder) in message
  assert "missing (2): conv.bias, scale" in message
  assert "unexpected (1): extra.weight" in message
  assert "unfit (3)" in message
  assert "attn.to_k.weight is (6, 4), wanted (4, 6)" in message
  assert "norms.1.bias is of type int32" in message
  assert "norms.0.bias and" in message or "and norms.0.bias are the same" in message
  assert "position_ids" not in message


def test_kernels_of_another_rank_are_unfit(saved):
  _, folder = saved
  _edit(folder, lambda tensors: tensors.update({"attn.to_q.weight": np.zeros((4, 4, 1, 1), np.float32),
                                                "conv.weight": np.zeros(3, np.float32)}))
  with pytest.raises(hub.CheckpointError, match=r"to_q.weight is \(4, 4, 1, 1\), wanted \(4, 4\)"):
    hub.load(Tiny, folder)


def test_shards(saved):
  model, folder = saved
  whole = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(whole)
  whole.unlink()
  names = sorted(tensors)
  parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
  for file, keys in parts.items():
    safetensors.numpy.save_file({key: tensors[key] for key in keys}, folder / file)
  weight_map = {key: file for file, keys in parts.items() for key in keys}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  _same(hub.load(Tiny, folder), model)
  safetensors.numpy.save_file(tensors, folder / "model-00002-of-00002.safetensors")
  with pytest.raises(hub.CheckpointError, match="repeats tensors of another shard"):
    hub.load(Tiny, folder)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(hub.CheckpointError, match="not beside it: model-00002-of-00002.safetensors"):
    hub.load(Tiny, folder)


def test_half_precision_file_only_where_the_other_is_absent(saved):
  model, folder = saved
  hub.save(model, folder, CONFIG, file_name="diffusion_pytorch_model.fp16.safetensors")
  _same(hub.load(Tiny, folder), model)
  (folder / "model.safetensors").unlink()
  half = hub.load(Tiny, folder)
  np.testing.assert_array_equal(half.conv.kernel[...], np.asarray(model.conv.kernel[...], np.float16))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_named(saved, keep):
  _, folder = saved
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(hub.CheckpointError, match="model.safetensors .* download it again"):
    hub.load(Tiny, folder)


def test_pickles_are_refused(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(hub.CheckpointError, match=r"pickled weights \(pytorch_model.bin\).*safetensors.*_jax.convert"):
    hub.load(Tiny, tmp_path)


def test_absent_and_damaged_folders(saved):
  _, folder = saved
  with pytest.raises(hub.CheckpointError, match="no folder .*nowhere .*config.json"):
    hub.load(Tiny, folder / "nowhere")
  with pytest.raises(hub.CheckpointError, match="no folder .*nowhere"):
    hub.read_tensors(folder / "nowhere")
  (folder / "model.safetensors").unlink()
  with pytest.raises(hub.CheckpointError, match="no weights in .*looked for model or diffusion"):
    hub.load(Tiny, folder)
  for text, message in (("{", "not valid JSON"), ("[]", "holds a list"), ("{}", "no field 'width'"),
                        ('{"width": -1}', "config.json is no Tiny: width must be positive")):
    (folder / "config.json").write_text(text)
    with pytest.raises(hub.CheckpointError, match=message):
      hub.load(Tiny, folder)
  (folder / "config.json").unlink()
  with pytest.raises(hub.CheckpointError, match="no config.json in"):
    hub.load(Tiny, folder)


def test_writing_replaces_or_leaves_the_old_file(saved, monkeypatch):
  model, folder = saved
  before = (folder / "model.safetensors").read_bytes()

  def full_disk(tensors, path, metadata):
    path.write_bytes(b"half")
    raise OSError("no space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
  with pytest.raises(OSError, match="no space"):
    hub.save(model, folder, {"width": 5})
  assert (folder / "model.safetensors").read_bytes() == before
  assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
  assert hub.read_json(folder / "config.json") == CONFIG


def test_unknown_activation_names_the_file(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu", "hidden_size": 8}))
  with pytest.raises(hub.CheckpointError, match=r"config.json is no CLIPTextModel: hidden_act 'relu'"):
    hub.load(clip.CLIPTextModel, tmp_path)


def test_clip_round_trip_with_and_without_prefix(tmp_path):
  tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
  config = {"text_config": tower | {"vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19},
            "vision_config": tower | {"image_size": 8, "patch_size": 4}, "projection_dim": 4}
  model = clip.CLIPModel.from_json(config, rngs=nnx.Rngs(0))
  hub.save(model, tmp_path / "both", config, dtype=np.float32)
  _same(hub.load(clip.CLIPModel, tmp_path / "both"), model)
  text = tmp_path / "text"
  hub.save(model.text_model, text, config["text_config"], dtype=np.float32)
  assert all(name.startswith("text_model.") for name in hub.read_tensors(text))
  _same(hub.load(clip.CLIPTextModel, text), model.text_model)
  tensors = {name.removeprefix("text_model."): tensor for name, tensor in hub.read_tensors(text).items()}
  tensors["embeddings.position_ids"] = np.arange(6)[None]
  safetensors.numpy.save_file(tensors, text / "model.safetensors")
  _same(hub.load(clip.CLIPTextModel, text), model.text_model)
  with pytest.raises(ValueError, match="7 tokens; max_position_embeddings of the model is 6"):
    model.encode_text(np.zeros((1, 7), np.int32))
  with pytest.raises(ValueError, match="4x8 pixels .* image_size 8"):
    model.encode_image(np.zeros((1, 4, 8, 3), np.float32))
