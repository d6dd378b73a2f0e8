"""TAESD, a small autoencoder for the latents of Stable Diffusion, equal to diffusers' `AutoencoderTiny`.

Bohan, "Tiny AutoEncoder for Stable Diffusion" (github.com/madebyollin/taesd): distilled from the large
autoencoder, 1.2 million parameters a direction. Attribute paths are the parameter names of a diffusers folder.

Shapes: b batch, h w height and width of the image or its latents, c colour, z latent channel,
i j height and width inside, d width.
"""

import dataclasses
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import layers

RAW_FILES = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")  # the author's own layout
LATENT_BOUND = 3  # the decoder squashes latents into (-3, 3)
ONLY = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "shift_factor": 0}


@dataclasses.dataclass(frozen=True)
class TinyConfig:
  """The fields of `config.json` that TAESD uses; diffusers' defaults."""
  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
  decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
  num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
  num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
  scaling_factor: float = 1.0

  @classmethod
  def from_json(cls, config: Mapping) -> "TinyConfig":
    """Reads a parsed `config.json`; fields that change nothing here are passed over.

    Raises:
      ValueError: the config names something outside TAESD.
    """
    def bad(field, remedy):
      return ValueError(f"TAESD config: {field}={config.get(field)!r} is not supported; {remedy}")

    for field, value in ONLY.items():
      if config.get(field, value) != value:
        raise bad(field, f"expected {value!r}")
    new = layers.read_config(cls, config, "TAESD")
    for side in "encoder", "decoder":
      widths, counts = getattr(new, f"{side}_block_out_channels"), getattr(new, f"num_{side}_blocks")
      if len(set(widths)) > 1 or len(widths) != len(counts):
        raise bad(f"{side}_block_out_channels", f"expected one width, once for each of num_{side}_blocks={counts}")
    if len(new.num_encoder_blocks) != len(new.num_decoder_blocks):
      raise bad("num_decoder_blocks", f"expected as many levels as num_encoder_blocks={new.num_encoder_blocks}")
    return new


class Block(nnx.Module):
  """Three convolutions beside a shortcut."""

  def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
    conv = lambda: layers.conv(width, width, 3, dtype=dtype, rngs=rngs)
    self.conv = nnx.List([conv(), jax.nn.relu, conv(), jax.nn.relu, conv()])

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    hidden_bijd = x_bijd
    for layer in self.conv:
      hidden_bijd = layer(hidden_bijd)
    return jax.nn.relu(x_bijd + hidden_bijd)


class Tower(nnx.Module):
  """Layers one after another."""

  def __init__(self, stack: list, *, remat: bool):
    self.layers = nnx.List(stack)
    self.remat = remat

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    for layer in self.layers:
      if isinstance(layer, Block):
        x_bijd = layers.call(operator.call, layer, x_bijd, remat=self.remat)
      else:
        x_bijd = layer(x_bijd)
    return x_bijd


def _encoder(config: TinyConfig, *, dtype, remat: bool, rngs: nnx.Rngs) -> Tower:
  """Images in [0, 1] to latents: at each level but the first, half the height and width."""
  width, own = config.encoder_block_out_channels[0], dict(dtype=dtype, rngs=rngs)
  stack = [layers.conv(config.in_channels, width, 3, **own)]
  for level, count in enumerate(config.num_encoder_blocks):
    if level:
      stack.append(layers.conv(width, width, 3, stride=2, bias=False, **own))
    stack += [Block(width, **own) for _ in range(count)]
  stack.append(layers.conv(width, config.latent_channels, 3, dtype=jnp.float32, rngs=rngs))
  return Tower(stack, remat=remat)


def _decoder(config: TinyConfig, *, dtype, remat: bool, rngs: nnx.Rngs) -> Tower:
  """Squashed latents to images in about [0, 1]: after each level but the last, twice the height and width."""
  width, own = config.decoder_block_out_channels[0], dict(dtype=dtype, rngs=rngs)
  stack = [layers.conv(config.latent_channels, width, 3, **own), jax.nn.relu]
  for level, count in enumerate(config.num_decoder_blocks):
    if level:
      stack += [layers.double, layers.conv(width, width, 3, bias=False, **own)]
    stack += [Block(width, **own) for _ in range(count)]
  stack.append(layers.conv(width, config.out_channels, 3, dtype=jnp.float32, rngs=rngs))
  return Tower(stack, remat=remat)


class AutoencoderTiny(nnx.Module):
  """Images to latents of an eighth of their size (four levels) and back; stands in for `vae.AutoencoderKL`.

  Its latents are the UNet's own: `scaling_factor` is 1.
  """

  def __init__(self, config: TinyConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
    self.config = config
    self.scaling_factor = config.scaling_factor
    self.encoder = _encoder(config, dtype=dtype, remat=remat, rngs=rngs)
    self.decoder = _decoder(config, dtype=dtype, remat=remat, rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, remat: bool = False,
                rngs: nnx.Rngs) -> "AutoencoderTiny":
    """Builds the module of a parsed `config.json`; see `TinyConfig.from_json` for errors.

    Args:
      config: the parsed file; empty for the author's own files, which have none.
      dtype: of the computation; the last convolutions are float32 in any case.
      remat: compute each block's activations again in the backward pass instead of keeping them.
      rngs: for fresh weights; `hub.abstract` makes none.
    """
    return cls(TinyConfig.from_json(config), dtype=dtype, remat=remat, rngs=rngs)

  @property
  def factor(self) -> int:
    """Height of an image in units of its latents' height."""
    return 2 ** (len(self.config.num_decoder_blocks) - 1)

  def encode(self, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `(mean_bhwz, logvar_bhwz)`; images are in [-1, 1]. The latents are exact: log variance -inf."""
    mean_bhwz = self.encoder((images_bhwc + 1) / 2)
    return mean_bhwz, jnp.full_like(mean_bhwz, -jnp.inf)

  def decode(self, latents_bhwz: jax.Array) -> jax.Array:
    """Returns `images_bhwc`, about [-1, 1] but not clipped."""
    return 2 * self.decoder(LATENT_BOUND * jnp.tanh(latents_bhwz / LATENT_BOUND)) - 1


def from_raw(encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of `RAW_FILES` under the names of a diffusers folder.

  The files count the layers of a sequence, and the decoder's first is the squashing of its latents.
  """
  named = {}
  for part, tensors, first in ("encoder", encoder, 0), ("decoder", decoder, 1):
    for key, tensor in tensors.items():
      number, _, rest = key.partition(".")
      layer = f"layers.{int(number) - first}" if number.isdecimal() else number
      named[f"{part}.{layer}.{rest}"] = tensor
  return named
