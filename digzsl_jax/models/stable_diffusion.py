"""Stable Diffusion as one module: text tower, denoiser and autoencoder of a diffusers folder or a single file.

Shapes: b image, l position, n learnt vector, d text width, h w pixel or latent position, c colour, z latent channel.
"""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax import diffusion
from digzsl_jax.models import clip, hub, single_file, taesd, unet
from digzsl_jax.models import vae as kl

PIXELS = 2**18  # decoded at once: of one picture of 512 x 512 they fill any device, and take it most of a GiB
Autoencoder = kl.AutoencoderKL | taesd.AutoencoderTiny


class StableDiffusion(nnx.Module):
  """What a prompt and noise pass through; weights only, the schedule is an argument elsewhere."""

  def __init__(self, text_encoder: clip.CLIPTextModel, denoiser: unet.UNet2DConditionModel,
               autoencoder: Autoencoder):
    self.text_encoder = text_encoder
    self.unet = denoiser
    self.vae = autoencoder

  def text(self, ids_bl: jax.Array, vectors_bnd: jax.Array | None = None) -> jax.Array:
    """Text states `[b, l, d]` of prompts, with learnt vectors in them or without.

    Args:
      ids_bl: token ids; those beyond the vocabulary are learnt ones, counted from its end as in a text tower
        whose embedding table was lengthened (textual inversion, arXiv 2208.01618).
      vectors_bnd: id `vocabulary + n` of a row stands for its vector n; `[n, d]` for the same in all rows. Without
        them a learnt id makes its row NaN.
    """
    if vectors_bnd is None:
      return self.text_encoder(ids_bl)[0]
    own_bl = ids_bl - self.text_encoder.embeddings.token_embedding.num_embeddings
    known_bl = jnp.where(own_bl < 0, ids_bl, 0)
    vectors_bnd = jnp.broadcast_to(vectors_bnd, (len(ids_bl), *vectors_bnd.shape[-2:]))
    learnt_bld = jnp.take_along_axis(vectors_bnd, jnp.maximum(own_bl, 0)[..., None], axis=1)
    embeds_bld = jnp.where((own_bl < 0)[..., None], self.text_encoder.embed(known_bl), learnt_bld)
    return self.text_encoder(known_bl, embeds_bld)[0]

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, z)` of the size that the denoiser was trained on."""
    config = self.unet.config
    return config.sample_size, config.sample_size, config.in_channels

  @property
  def text_width(self) -> int:
    """Of the text states and of learnt vectors."""
    return self.text_encoder.embeddings.token_embedding.features

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """`(height, width, 3)` of decoded latents of `latent_shape`."""
    height, width, _ = self.latent_shape
    return height * self.vae.factor, width * self.vae.factor, self.vae.config.out_channels

  def decode(self, latents_bhwz: jax.Array) -> jax.Array:
    """Images in [-1, 1] (clipped) of latents as the denoiser knows them (scaled)."""
    return jnp.clip(self.vae.decode(latents_bhwz / self.vae.scaling_factor), -1, 1)

  def pixels(self, latents_bhwz: jax.Array) -> jax.Array:
    """`decode` as uint8, for files; large images a few at a time, so that memory does not grow with the batch."""
    b, h, w, _ = latents_bhwz.shape
    most = max(1, PIXELS // (h * w * self.vae.factor**2))
    part = max(n for n in range(1, min(most, b) + 1) if b % n == 0)
    some = lambda latents_bhwz: jnp.round((self.decode(latents_bhwz) + 1) * 127.5).astype(jnp.uint8)
    if part == b:
      return some(latents_bhwz)
    images = jax.lax.map(some, latents_bhwz.reshape(b // part, part, *latents_bhwz.shape[1:]))
    return images.reshape(b, *images.shape[2:])


def load(path: os.PathLike, *, denoiser: os.PathLike | None = None, vae: os.PathLike | None = None,
         dtype=jnp.float32, remat: bool = False) -> StableDiffusion:
  """Reads a diffusers folder (`text_encoder`, `unet`, `vae`) or a single `.safetensors` file.

  Args:
    path: the folder, or the file in the names of `single_file`.
    denoiser: folder of another denoiser in place of its own, as one that was distilled for few steps.
    vae: folder of another autoencoder in place of its own; see `load_autoencoder`.
    dtype: type of the computation.
    remat: compute activations again in the backward pass, which saves memory in gradients.

  Raises:
    CheckpointError: something is absent, damaged or does not fit.
  """
  read = _reader(pathlib.Path(path))
  if denoiser is not None:
    check_denoiser(path, denoiser)
  text_encoder = read(clip.CLIPTextModel, "text_encoder", dtype=dtype)
  own = dict(dtype=dtype, remat=remat)
  painter = (read(unet.UNet2DConditionModel, "unet", **own) if denoiser is None
             else hub.load(unet.UNet2DConditionModel, denoiser, **own))
  if vae is None:
    return StableDiffusion(text_encoder, painter, read(kl.AutoencoderKL, "vae", **own))
  autoencoder = load_autoencoder(vae, **own)
  wanted, given = painter.config.in_channels, autoencoder.config.latent_channels
  if wanted != given:
    raise hub.CheckpointError(f"the autoencoder {vae} has latents of {given} channels, the denoiser of {path} takes "
                              f"{wanted}: they do not belong together")
  return StableDiffusion(text_encoder, painter, autoencoder)


def check_denoiser(path: os.PathLike, denoiser: os.PathLike) -> None:
  """Reads the configs alone of the denoiser of `path` and of the one that `load` is to take in its place.

  Raises:
    CheckpointError: one is absent or none of Stable Diffusion 1.x and 2.x, or `denoiser` was made for other text states
      or latents than those of `path`.
  """
  path = pathlib.Path(path)
  own = (single_file.SingleFile(path).configs["unet"] if single_file.is_single(path)
         else hub.read_json(path / "unet" / "config.json"))
  found = []
  for source, config in ((path, own), (denoiser, hub.read_json(pathlib.Path(denoiser) / "config.json"))):
    try:
      found.append(unet.UNetConfig.from_json(config))
    except ValueError as error:
      raise hub.CheckpointError(f"{source} has a denoiser that cannot be used: {error}") from error
  for field in ("cross_attention_dim", "in_channels", "out_channels"):
    wanted, given = (getattr(config, field) for config in found)
    if wanted != given:
      raise hub.CheckpointError(f"the denoiser {denoiser} has {field}={given}, that of {path} {wanted}: it belongs to "
                                "another Stable Diffusion")


def load_autoencoder(folder: os.PathLike, *, dtype=jnp.float32, remat: bool = False) -> Autoencoder:
  """Reads the diffusers folder of an `AutoencoderKL` or `AutoencoderTiny`, or one with TAESD's own two files.

  Raises:
    CheckpointError: the folder is absent, damaged or holds none of these.
  """
  folder = pathlib.Path(folder)
  raw = [folder / name for name in taesd.RAW_FILES]
  if any(file.is_file() for file in raw):
    tensors = taesd.from_raw(*(hub.Tensors([file]) for file in raw))
    model = hub.abstract(taesd.AutoencoderTiny, {}, dtype=dtype, remat=remat)
    return hub.fill(model, tensors, source=folder)
  is_tiny = hub.read_json(folder / "config.json").get("_class_name") == "AutoencoderTiny"
  return hub.load(taesd.AutoencoderTiny if is_tiny else kl.AutoencoderKL, folder, dtype=dtype, remat=remat)


def load_schedule(path: os.PathLike) -> diffusion.Schedule:
  """Reads `scheduler` of a diffusers folder; of a single file, the one beside it or else its release's."""
  path = pathlib.Path(path)
  config = (single_file.SingleFile(path).configs["scheduler"] if single_file.is_single(path)
            else hub.read_json(path / "scheduler" / "scheduler_config.json"))
  return diffusion.Schedule.from_config(config)


def tokenizer_folder(path: os.PathLike) -> pathlib.Path:
  """`tokenizer` of a diffusers folder, or beside a single file.

  Raises:
    CheckpointError: a single file stands alone.
  """
  path = pathlib.Path(path)
  if not single_file.is_single(path):
    return path / "tokenizer"
  folder = path.parent / "tokenizer"
  if not folder.is_dir():
    raise hub.CheckpointError(f"{path} holds no tokenizer, and there is no folder {folder}: put the folder tokenizer/ "
                              "of the model's repository beside the file")
  return folder


def _reader(path: pathlib.Path) -> Callable[..., nnx.Module]:
  """`read(model type, part, **switches)` of a folder or a single file."""
  if single_file.is_single(path):
    return single_file.SingleFile(path).load
  return lambda model_type, part, **switches: hub.load(model_type, path / part, **switches)
