"""Stable Diffusion as one module: text tower, denoiser and autoencoder of a diffusers folder.

Shapes: b image, l position, d text width, h w pixel or latent position, c colour, z latent channel.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax import diffusion
from digzsl_jax.models import clip, hub, unet, vae


class StableDiffusion(nnx.Module):
  """What a prompt and noise pass through; weights only, the schedule is an argument elsewhere."""

  def __init__(self, text_encoder: clip.CLIPTextModel, denoiser: unet.UNet2DConditionModel,
               autoencoder: vae.AutoencoderKL):
    self.text_encoder = text_encoder
    self.unet = denoiser
    self.vae = autoencoder

  def text(self, ids_bl: jax.Array, slot_b: jax.Array | None = None,
           token_bd: jax.Array | None = None) -> jax.Array:
    """Text states `[b, l, d]`; `token_bd` replaces the embedding at position `slot_b` of each row."""
    if token_bd is None:
      return self.text_encoder(ids_bl)[0]
    here_bl = jnp.arange(ids_bl.shape[1]) == slot_b[:, None]
    embeds_bld = jnp.where(here_bl[..., None], token_bd[:, None], self.text_encoder.embed(ids_bl))
    return self.text_encoder(ids_bl, embeds_bld)[0]

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, z)` of the size that the denoiser was trained on."""
    config = self.unet.config
    return config.sample_size, config.sample_size, config.in_channels

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """`(height, width, 3)` of decoded latents of `latent_shape`."""
    height, width, _ = self.latent_shape
    factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
    return height * factor, width * factor, self.vae.config.out_channels

  def decode(self, latents_bhwz: jax.Array) -> jax.Array:
    """Images in [-1, 1] (clipped) of latents as the denoiser knows them (scaled)."""
    return jnp.clip(self.vae.decode(latents_bhwz / self.vae.scaling_factor), -1, 1)


def load(folder: os.PathLike, *, dtype=jnp.float32, remat: bool = False) -> StableDiffusion:
  """Reads `text_encoder`, `unet` and `vae` of a diffusers folder; `remat` saves memory in gradients."""
  folder = pathlib.Path(folder)
  return StableDiffusion(hub.load(clip.CLIPTextModel, folder / "text_encoder", dtype=dtype),
                         hub.load(unet.UNet2DConditionModel, folder / "unet", dtype=dtype, remat=remat),
                         hub.load(vae.AutoencoderKL, folder / "vae", dtype=dtype, remat=remat))


def load_schedule(folder: os.PathLike) -> diffusion.Schedule:
  """Reads `scheduler` of a diffusers folder."""
  return diffusion.Schedule.from_config(hub.read_json(pathlib.Path(folder) / "scheduler" / "scheduler_config.json"))
