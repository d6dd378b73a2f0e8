"""TAESD without the reference: layouts, configs, memory, and what it does to real photographs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from digzsl_jax import files
from digzsl_jax.models import hub, stable_diffusion, taesd

SMALL = {"encoder_block_out_channels": [8] * 2, "decoder_block_out_channels": [8] * 2,
         "num_encoder_blocks": [1, 2], "num_decoder_blocks": [2, 1]}


def abstract(config, **switches):
  return hub.abstract(taesd.AutoencoderTiny, config, **switches)


def filled(model):
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1), leaf.dtype)
  graphdef, state = nnx.split(model)
  return nnx.merge(graphdef, jax.tree.map(draw, state))


@functools.cache
def published():
  """`(model, tensors of each of the author's files)` with random weights in the published sizes."""
  model = filled(abstract({}))
  tensors = {"encoder": {}, "decoder": {}}
  for part, first in ("encoder", 0), ("decoder", 1):
    for number, layer in enumerate(getattr(model, part).layers, first):
      inner = enumerate(layer.conv) if isinstance(layer, taesd.Block) else ()
      for name, conv in {"": layer, **{f"conv.{n}.": conv for n, conv in inner}}.items():
        if isinstance(conv, nnx.Conv):
          kernel = np.ascontiguousarray(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1))
          tensors[part][f"{number}.{name}weight"] = kernel
          if conv.bias is not None:
            tensors[part][f"{number}.{name}bias"] = np.asarray(conv.bias[...])
  return model, tensors


@pytest.fixture
def raw(tmp_path):
  for file, tensors in zip(taesd.RAW_FILES, published()[1].values()):
    safetensors.numpy.save_file(tensors, tmp_path / file)
  return tmp_path


def same(first, second):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))


def test_published_size():
  count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
  model, tensors = published()
  assert (count(model.encoder), count(model.decoder)) == (1_222_532, 1_222_531)
  assert [len(part) for part in tensors.values()] == [67, 67]
  assert model.factor == 8 and model.scaling_factor == 1


def test_both_layouts_hold_the_same(raw, tmp_path):
  model = stable_diffusion.load_autoencoder(raw)
  same(model, published()[0])
  hub.save(model, tmp_path / "diffusers", {"_class_name": "AutoencoderTiny"}, dtype=np.float32,
           file_name="diffusion_pytorch_model.safetensors")
  same(stable_diffusion.load_autoencoder(tmp_path / "diffusers"), model)


def test_damaged_raw_files(raw):
  encoder, decoder = (raw / name for name in taesd.RAW_FILES)
  whole = decoder.read_bytes()
  decoder.write_bytes(whole[:-1])
  with pytest.raises(hub.CheckpointError, match="taesd_decoder.safetensors .*download it again"):
    stable_diffusion.load_autoencoder(raw)
  decoder.unlink()
  with pytest.raises(hub.CheckpointError, match="no file .*taesd_decoder.safetensors"):
    stable_diffusion.load_autoencoder(raw)
  decoder.write_bytes(encoder.read_bytes())  # numbered from 0
  with pytest.raises(hub.CheckpointError, match="(?s)missing .*decoder.layers.0.*unexpected .*decoder.layers.-1"):
    stable_diffusion.load_autoencoder(raw)
  decoder.write_bytes(whole)
  safetensors.numpy.save_file(published()[1]["encoder"] | {"scale": np.zeros(1, np.float32)}, encoder)
  with pytest.raises(hub.CheckpointError, match="unexpected .*encoder.scale"):
    stable_diffusion.load_autoencoder(raw)


@pytest.mark.parametrize("field, value", [
  ("act_fn", "silu"), ("upsample_fn", "bilinear"), ("upsampling_scaling_factor", 3), ("shift_factor", 0.1),
  ("encoder_block_out_channels", [8, 16]), ("decoder_block_out_channels", [8]), ("num_decoder_blocks", [1, 1, 1]),
  ("latent_channels", "4"), ("scaling_factor", None)])
def test_config_names_the_field_it_cannot_serve(field, value):
  with pytest.raises(ValueError, match=f"TAESD config: {field}=|TAESD config: decoder_block_out_channels="):
    taesd.TinyConfig.from_json({**SMALL, field: value})


def test_levels_of_both_towers_agree():
  with pytest.raises(ValueError, match="TAESD config: num_decoder_blocks=.*as many levels"):
    taesd.TinyConfig.from_json({**SMALL, "num_decoder_blocks": [1], "decoder_block_out_channels": [8]})


def test_remat_keeps_less_for_the_backward_pass():
  def kept(remat):
    graphdef, state = nnx.split(abstract({}, remat=remat))
    backward = jax.eval_shape(lambda x, state: jax.vjp(lambda x: nnx.merge(graphdef, state).decode(x), x)[1],
                              jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), state)
    return sum(leaf.size for leaf in jax.tree.leaves(backward) if leaf.ndim > 2 and leaf.shape[0] == 2)
  print(kept(True), kept(False))
  assert kept(True) < 0.5 * kept(False)


def test_bfloat16_ends_in_float32():
  model, images_bhwc = filled(abstract(SMALL)), jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1)

  def run(graphdef):
    model_of = functools.partial(nnx.merge, graphdef)
    latents_bhwz = jax.jit(lambda state: model_of(state).encode(images_bhwc)[0])(nnx.state(model))
    return latents_bhwz, jax.jit(lambda state: model_of(state).decode(latents_bhwz))(nnx.state(model))

  exact, rough = run(nnx.graphdef(model)), run(nnx.graphdef(abstract(SMALL, dtype=jnp.bfloat16)))
  for want, got in zip(exact, rough):
    assert got.dtype == jnp.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=0.05 * float(jnp.abs(want).max()))


def test_autoencoder_of_other_latents_is_refused(tmp_path, tiny_world):
  config = SMALL | {"_class_name": "AutoencoderTiny", "latent_channels": 8}
  hub.save(filled(abstract(config)), tmp_path, config)
  with pytest.raises(hub.CheckpointError, match="latents of 8 channels, the denoiser of .* takes 4"):
    stable_diffusion.load(tiny_world / "sd", vae=tmp_path)


def test_autoencoder_in_place_of_the_checkpoints_own(tmp_path, tiny_world):
  config = SMALL | {"_class_name": "AutoencoderTiny"}
  model = filled(abstract(config))
  hub.save(model, tmp_path, config, dtype=np.float32)
  own, sd = stable_diffusion.load(tiny_world / "sd"), stable_diffusion.load(tiny_world / "sd", vae=tmp_path)
  same(sd.vae, model)
  same(sd.unet, own.unet)
  assert own.image_shape == (32, 32, 3) and sd.image_shape == (16, 16, 3)  # factors 4 and 2
  again = stable_diffusion.load(tiny_world / "sd", vae=tiny_world / "sd" / "vae")
  same(again.vae, own.vae)
  files.write_json(tmp_path / "config.json", SMALL | {"_class_name": "AutoencoderKL"})
  with pytest.raises(hub.CheckpointError, match="AutoencoderKL"):
    stable_diffusion.load(tiny_world / "sd", vae=tmp_path)


def test_real_photographs_survive(real_data):
  """Published weights, birds at 256 x 256: the reconstruction is close, and far closer than a mere thumbnail."""
  paths = sorted((real_data / "cub100" / "images").glob("*/0000.jpg"))[::6][:16]
  pictures = [Image.open(path).convert("RGB").resize((256, 256), Image.BICUBIC) for path in paths]
  images_bhwc = np.stack([np.asarray(picture, np.float32) for picture in pictures]) / 127.5 - 1
  small = [picture.resize((32, 32), Image.BOX).resize((256, 256), Image.BICUBIC) for picture in pictures]
  thumbnails_bhwc = np.stack([np.asarray(picture, np.float32) for picture in small]) / 127.5 - 1
  graphdef, state = nnx.split(stable_diffusion.load_autoencoder(real_data / "taesd"))

  @jax.jit
  def there_and_back(state, images_bhwc):
    model = nnx.merge(graphdef, state)
    latents_bhwz = model.encode(images_bhwc)[0]
    return latents_bhwz, jnp.clip(model.decode(latents_bhwz), -1, 1)

  latents_bhwz, out_bhwc = there_and_back(state, images_bhwc)
  psnr = lambda got: 10 * np.log10(4 / ((np.asarray(got) - images_bhwc) ** 2).mean((1, 2, 3)))
  print("PSNR", psnr(out_bhwc).round(1), psnr(out_bhwc).mean(), "thumbnails", psnr(thumbnails_bhwc).mean())
  assert latents_bhwz.shape == (16, 32, 32, 4)
  assert 0.5 < latents_bhwz.std() < 1.5  # the scale that the denoiser knows
  assert psnr(out_bhwc).min() > 22 and psnr(out_bhwc).mean() > 25
  assert (psnr(out_bhwc) > psnr(thumbnails_bhwc)).all()
