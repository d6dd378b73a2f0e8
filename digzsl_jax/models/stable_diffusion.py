"""Stable Diffusion as one module: text tower, denoiser and autoencoder of a diffusers folder.

Shapes: b image, l position, n learnt vector, d text width, h w pixel or latent position, c colour, z latent channel.
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
