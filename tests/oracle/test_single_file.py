"""Single files: that what the tests write is that layout, diffusers says; that we read it back, these tests."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.loaders import single_file_utils

from digzsl_jax import diffusion
from digzsl_jax.models import clip, hub, single_file, stable_diffusion, unet, vae
from tests import ldm

TYPES = {"text_encoder": clip.CLIPTextModel, "unet": unet.UNet2DConditionModel, "vae": vae.AutoencoderKL}


def references(configs: dict) -> dict:
  """The reference's modules of a release, with random weights unless on another device."""
  return {"text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder"])),
          "unet": diffusers.UNet2DConditionModel(**configs["unet"]), "vae": diffusers.AutoencoderKL(**configs["vae"])}


def tensors_of(module) -> dict:
  """`state_dict` in numpy; one on the device `meta` as zeros that take no memory."""
  return {key: np.broadcast_to(np.float32(0), tuple(tensor.shape)) if tensor.is_meta else tensor.numpy()
          for key, tensor in module.state_dict().items() if not key.endswith("position_ids")}


def same_tensors(got: dict, want: dict):
  assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())[:9]
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def plain(tensors: dict) -> dict:
  return {key.removeprefix("text_model."): np.asarray(tensor) for key, tensor in tensors.items()
          if not key.endswith("position_ids")}


@pytest.mark.parametrize("release", ldm.TINY)
def test_both_ways(release, tmp_path, monkeypatch):
  torch.manual_seed(0)
  configs, theirs = ldm.TINY[release], references(ldm.TINY[release])
  parts = {part: tensors_of(module) for part, module in theirs.items()}
  file = ldm.whole(parts, configs, release)

  # The file has the layout that diffusers converts into its own.
  stored = {key: torch.tensor(tensor) for key, tensor in file.items()}
  same_tensors(plain(single_file_utils.convert_ldm_unet_checkpoint(dict(stored), configs["unet"])), parts["unet"])
  same_tensors(plain(single_file_utils.convert_ldm_vae_checkpoint(dict(stored), configs["vae"])), parts["vae"])
  if release == "sd15":
    text = single_file_utils.convert_ldm_clip_checkpoint(dict(stored))
  else:
    width, last = configs["text_encoder"]["hidden_size"], "cond_stage_model.model.transformer.resblocks.2."
    kept = {key: tensor for key, tensor in stored.items() if not key.startswith(last) and "text_proj" not in key}
    theirs["text_encoder"].config.hidden_size = width
    text = single_file_utils.convert_open_clip_checkpoint(theirs["text_encoder"], kept)
  same_tensors(plain(text), plain(parts["text_encoder"]))

  # And so do we, tensor by tensor and as a whole.
  split = single_file.split(file | ldm.training_state(), configs)
  same_tensors(dict(split["unet"]), parts["unet"])
  same_tensors(dict(split["vae"]), parts["vae"])
  same_tensors(plain(split["text_encoder"]), plain(parts["text_encoder"]))
  monkeypatch.setattr(single_file, "CONFIGS", ldm.TINY)
  safetensors.numpy.save_file({key: np.array(tensor, order="C") for key, tensor in file.items()},
                              tmp_path / "model.safetensors")
  sd = stable_diffusion.load(tmp_path / "model.safetensors")
  for part, ours in ("text_encoder", sd.text_encoder), ("unet", sd.unet), ("vae", sd.vae):
    theirs[part].save_pretrained(tmp_path / part)
    want = nnx.state(hub.load(TYPES[part], tmp_path / part))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), want)


PUBLISHED = {  # keys that files of the release are told by, and the number of all
  "sd15": (1131, ["cond_stage_model.transformer.text_model.embeddings.position_ids"]),
  "sd21": (686 + 248 + 294, ["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"])}
COMMON = ["model.diffusion_model.time_embed.2.bias", "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
          "model.diffusion_model.output_blocks.2.1.conv.weight", "model.diffusion_model.output_blocks.8.2.conv.bias",
          "model.diffusion_model.input_blocks.3.0.op.weight", "model.diffusion_model.middle_block.1.proj_in.weight",
          "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
          "first_stage_model.encoder.mid.attn_1.q.weight", "first_stage_model.decoder.up.3.upsample.conv.weight",
          "first_stage_model.encoder.down.2.downsample.conv.bias", "first_stage_model.decoder.norm_out.weight"]


@pytest.mark.parametrize("release", PUBLISHED)
def test_published_sizes(release):
  configs, (count, names) = single_file.CONFIGS[release], PUBLISHED[release]
  with torch.device("meta"):
    parts = {part: tensors_of(module) for part, module in references(configs).items()}
  file = ldm.whole(parts, configs, release)
  assert len(file) == count and set(names + COMMON) <= set(file)
  assert single_file_utils.infer_diffusers_model_type(file) == {"sd15": "v1", "sd21": "v2"}[release]
  split = single_file.split(file, configs)
  for part, want in parts.items():
    got = {name: tensor.shape for name, tensor in plain(split[part]).items()}
    assert got == {name: tensor.shape for name, tensor in plain(want).items()}
    own = nnx.to_flat_state(nnx.state(hub.abstract(TYPES[part], configs[part])))
    assert sorted(np.prod(shape) for shape in got.values()) == sorted(leaf.size for _, leaf in own)


@pytest.mark.parametrize("release", single_file.CONFIGS)
def test_schedulers_are_those_of_diffusers(release):
  config = single_file.CONFIGS[release]["scheduler"]
  theirs = getattr(diffusers, config["_class_name"]).from_config(config)
  unused = {"_class_name", "clip_sample"}  # the published PNDM config has the latter too
  assert set(config) - unused <= set(theirs.config)
  ours = diffusion.Schedule.from_config(config)
  np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6)
  assert ours.prediction_type == theirs.config.prediction_type
