"""Stable Diffusion from a single file, without PyTorch: what is read, and what is refused."""

import functools
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from digzsl_jax import logs
from digzsl_jax.models import clip, hub, single_file, stable_diffusion, unet, vae
from digzsl_jax.workspace import Workspace
from tests import ldm

TYPES = {"text_encoder": clip.CLIPTextModel, "unet": unet.UNet2DConditionModel, "vae": vae.AutoencoderKL}
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
DENOISER = "model.diffusion_model."


def releases():
  """Tiny ones; as in earnest, the two of 2.x differ in size and prediction."""
  flat = dict(block_out_channels=(8, 16), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
  tiny = {name: configs | {"unet": configs["unet"] | flat} for name, configs in ldm.TINY.items()}
  small, v = tiny["sd21"], {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction"}
  large = small | {"unet": small["unet"] | {"sample_size": 12}, "scheduler": v}
  noise = {"_class_name": "PNDMScheduler", **BETAS, "prediction_type": "epsilon", "skip_prk_steps": True}
  return {"sd15": tiny["sd15"] | {"scheduler": noise}, "sd21_base": small | {"scheduler": noise}, "sd21": large}


@functools.cache
def made(release):
  """`(models by part, tensors of the single file)`."""
  rng, models, parts = np.random.default_rng(0), {}, {}
  for part, kind in TYPES.items():
    config = releases()[release][part]
    model = hub.abstract(kind, config)
    random = lambda leaf, rng=rng: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    nnx.update(model, jax.tree.map(random, nnx.state(model)))
    with tempfile.TemporaryDirectory() as folder:
      hub.save(model, folder, config, dtype=np.float32)
      parts[part] = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    models[part] = model
  return models, ldm.whole(parts, releases()[release], release)


@pytest.fixture
def write(tmp_path, monkeypatch):
  """`write(release, change, metadata) -> path`, with the tiny configs in place of the published ones."""
  monkeypatch.setattr(single_file, "CONFIGS", releases())

  def write(release, change=lambda tensors: None, metadata=None, dtype=np.float32):
    tensors = dict(made(release)[1])
    change(tensors)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
      {key: np.array(tensor, dtype if tensor.dtype == np.float32 else None, order="C")
       for key, tensor in tensors.items()}, path, metadata)
    return path
  return write


@pytest.mark.parametrize("release, stated", [("sd15", None), ("sd21", "v")])
def test_every_part(write, release, stated):
  metadata = {"modelspec.prediction_type": stated} if stated else None
  sd = stable_diffusion.load(write(release, lambda tensors: tensors.update(ldm.training_state()), metadata))
  for part, ours in ("text_encoder", sd.text_encoder), ("unet", sd.unet), ("vae", sd.vae):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(made(release)[0][part]))
  assert sd.latent_shape == {"sd15": (8, 8, 4), "sd21": (12, 12, 4)}[release]


@pytest.mark.parametrize("release, stated, size, prediction, kind", [
  ("sd15", None, 8, "epsilon", "pndm"), ("sd15", "v", 8, "v_prediction", "pndm"),
  ("sd21", "v", 12, "v_prediction", "ddim"), ("sd21", "epsilon", 8, "epsilon", "pndm")])
def test_release_and_schedule(write, release, stated, size, prediction, kind):
  path = write(release, metadata={"modelspec.prediction_type": stated} if stated else None)
  schedule = stable_diffusion.load_schedule(path)
  assert (schedule.prediction_type, schedule.kind) == (prediction, kind)
  assert single_file.SingleFile(path).configs["unet"]["sample_size"] == size


def test_half_precision(write):
  autoencoder = single_file.SingleFile(write("sd15", dtype=np.float16)).load(vae.AutoencoderKL, "vae")
  want = np.asarray(made("sd15")[0]["vae"].quant_conv.kernel[...], np.float16)
  np.testing.assert_array_equal(autoencoder.quant_conv.kernel[...], want)
  assert autoencoder.quant_conv.kernel.dtype == np.float32


def test_one_tensor_at_a_time(write):
  class Watched(dict):
    read = []

    def __getitem__(self, key):
      self.read.append(key)
      return super().__getitem__(key)

  file = Watched(made("sd21")[1])
  parts = single_file.split(file, releases()["sd21"])
  assert not Watched.read  # names alone
  for count, tensor in enumerate(parts["unet"].values(), 1):
    assert len(Watched.read) == count and tensor.dtype == np.float32


def test_prediction_of_stable_diffusion_2(write):
  path = write("sd21")
  for load in stable_diffusion.load, stable_diffusion.load_schedule:
    with pytest.raises(hub.CheckpointError, match="model.safetensors: neither weights nor metadata.*folder scheduler/"):
      load(path)
  own = path.parent / "scheduler"
  own.mkdir()
  config = {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction", "steps_offset": 7}
  (own / "scheduler_config.json").write_text(json.dumps(config))
  assert stable_diffusion.load_schedule(path).config["steps_offset"] == 7
  assert single_file.SingleFile(path).configs["unet"]["sample_size"] == 12
  # The folder goes before what the file says of itself.
  path = write("sd21", metadata={"modelspec.prediction_type": "epsilon"})
  assert stable_diffusion.load_schedule(path).prediction_type == "v_prediction"


def without(prefix):
  def change(tensors):
    for key in [key for key in tensors if key.startswith(prefix)]:
      del tensors[key]
  return change


def with_tensor(key, shape=(1,)):
  return lambda tensors: tensors.update({key: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("change, message", [
  (without("first_stage_model."), "model.safetensors holds no autoencoder: take a file with all"),
  (without("cond_stage_model."), "model.safetensors holds no text encoder"),
  (without(DENOISER), "no model.diffusion_model.input_blocks.1.1.* so this is no Stable Diffusion in a single file"),
  (without(DENOISER + "out.2.bias"), r"\(denoiser\): (?s:.*)missing \(1\): conv_out.bias"),
  (without("first_stage_model.encoder.mid.attn_1.q."), r"\(autoencoder\): (?s:.*)missing \(2\): .*to_q"),
  (with_tensor(single_file.CONTEXT, (8, 2048)), "takes text of width 2048, which is neither"),
  (with_tensor("conditioner.embedders.1.model.ln_final.bias"), "1 tensors belong to no part .*: conditioner"),
  (with_tensor(DENOISER + "label_emb.0.0.weight"), "1 tensors belong to no part .*label_emb.0.0.weight"),
  (with_tensor(DENOISER + "input_blocks.1.1.norm.extra"), r"unexpected \(1\): down_blocks.0.attentions.0.norm.extra"),
  (with_tensor(DENOISER + "input_blocks.2.1.op.weight"), "1 tensors belong to no part .*input_blocks.2.1.op.weight"),
  (with_tensor("first_stage_model.loss.logvar"), "belong to no part .*first_stage_model.loss.logvar"),
  (with_tensor("first_stage_model.decoder.mid.attn_1.u.weight"), "belong to no part .*attn_1.u.weight"),
  (with_tensor("cond_stage_model.model.attn_mask"), "belong to no part .*attn_mask"),
  (with_tensor("cond_stage_model.model.transformer.resblocks.3.ln_1.bias"), "unexpected .*layers.3.layer_norm1.bias"),
  (with_tensor(DENOISER + "input_blocks.0.0.weight", (8, 9, 3, 3)), r"conv_in.weight is \(8, 9, 3, 3\), wanted \(8, 4"),
  (with_tensor("first_stage_model.decoder.mid.attn_1.q.weight", (24, 24, 3, 3)), r"is \(24, 24, 3, 3\), wanted"),
])
def test_what_does_not_fit_is_named(write, change, message):
  path = write("sd15", change)
  with pytest.raises(hub.CheckpointError, match=message):
    file = single_file.SingleFile(path)
    for part in "vae", "text_encoder", "unet":
      file.load(TYPES[part], part)


def test_many_unknown_names_are_counted(write):
  many = lambda tensors: tensors.update({f"lora_{n:02}": np.zeros(1, np.float32) for n in range(20)})
  with pytest.raises(hub.CheckpointError, match=r"20 tensors .*: lora_00, .*lora_07, \.\.\.$"):
    stable_diffusion.load(write("sd15", many))


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_file(write, keep):
  path = write("sd15")
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(hub.CheckpointError, match="model.safetensors .*download it again"):
    stable_diffusion.load(path)


def test_absent_and_pickled_files(tmp_path):
  with pytest.raises(hub.CheckpointError, match="no file .*none.safetensors"):
    stable_diffusion.load(tmp_path / "none.safetensors")
  (tmp_path / "sd.ckpt").write_bytes(b"\x80\x04.")
  for load in stable_diffusion.load, stable_diffusion.load_schedule, stable_diffusion.tokenizer_folder:
    with pytest.raises(hub.CheckpointError, match="python -m digzsl_jax.convert .*sd.ckpt .*sd.safetensors"):
      load(tmp_path / "sd.ckpt")


def test_the_tokenizer_is_beside_the_file(write, tmp_path):
  path = write("sd15")
  with pytest.raises(hub.CheckpointError, match="model.safetensors holds no tokenizer.* folder tokenizer/"):
    stable_diffusion.tokenizer_folder(path)
  (tmp_path / "tokenizer").mkdir()
  assert stable_diffusion.tokenizer_folder(path) == tmp_path / "tokenizer"
  assert stable_diffusion.tokenizer_folder(tmp_path / "folder") == tmp_path / "folder" / "tokenizer"


def test_a_run_takes_a_single_file_and_another_autoencoder(write, tiny_config, tiny_world, tmp_path):
  def workspace(**models):
    tiny_config.models.update(models)
    return Workspace(tiny_config.to_dict(), tmp_path / "run", logs.Log(tmp_path / "run"))

  folder = workspace().model_fingerprints
  assert set(folder) == {"clip", "sd", "judge", "encoder", "inception", "unet", "initial_file"}
  assert isinstance(folder["sd"], str)
  path = write("sd15")
  with pytest.raises(ValueError, match="holds no tokenizer"):
    workspace(sd=str(path)).model_fingerprints  # noqa: B018
  (tmp_path / "tokenizer").symlink_to(tiny_world / "sd" / "tokenizer")
  single = workspace()
  assert single.sd_tokenizer.length == 16 and single.schedule.kind == "pndm"
  other = workspace(vae=str(tiny_world / "sd" / "vae"))
  np.testing.assert_array_equal(other.sd.unet.conv_in.kernel[...], made("sd15")[0]["unet"].conv_in.kernel[...])
  assert other.sd.vae.config.block_out_channels == (8, 8, 8) != releases()["sd15"]["vae"]["block_out_channels"]
  found = [folder["sd"], single.model_fingerprints["sd"], other.model_fingerprints["sd"]]
  write("sd15", lambda tensors: tensors.update(betas=np.zeros(3, np.float32)))
  found.append(workspace().model_fingerprints["sd"])
  assert len({json.dumps(value) for value in found}) == 4
  with pytest.raises(ValueError, match="config.models.vae is 'nowhere', but there is no folder"):
    workspace(vae="nowhere").model_fingerprints  # noqa: B018
