"""The autoencoder of Stable Diffusion 1.x and 2.x, equal to diffusers' `AutoencoderKL`.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752).
Attribute paths are the parameter names of a diffusers folder `vae/`.

Shapes: b batch, h w height and width of the image or its latents, c colour, z latent channel,
i j height and width inside, l pixel position, d width.
"""

import dataclasses
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import layers

EPSILON = 1e-6  # of every norm
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The fields of `vae/config.json` that Stable Diffusion 1.x and 2.x use; diffusers' defaults."""
  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  @classmethod
  def from_json(cls, config: Mapping) -> "VAEConfig":
    """Reads a parsed `vae/config.json`; fields that change nothing here are passed over.

    Raises:
      ValueError: the config names something outside Stable Diffusion 1.x and 2.x.
    """
    def bad(field, remedy):
      return ValueError(f"VAE config: {field}={config.get(field)!r} is not supported; {remedy}")

    new = layers.read_config(cls, config, "VAE")
    widths = new.block_out_channels
    for field, kind in ("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"):
      if list(config.get(field, [kind])) != [kind] * len(widths):
        raise bad(field, f"expected {kind!r} for each of block_out_channels={widths}")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
      raise bad("act_fn", "expected 'silu'")
    for field in "shift_factor", "latents_mean", "latents_std":
      if config.get(field) is not None:
        raise bad(field, "latents of Stable Diffusion 1.x and 2.x have a scaling_factor alone")
    if any(c % new.norm_num_groups for c in widths):
      raise bad("norm_num_groups", f"it must divide each of block_out_channels={widths}")
    return new


class PixelAttention(layers.Attention):
  """Every pixel attends to every pixel with one head, beside a shortcut."""

  def __init__(self, width: int, groups: int, *, dtype, rngs: nnx.Rngs):
    super().__init__(width, width, 1, bias=True, dtype=dtype, rngs=rngs)
    self.group_norm = layers.group_norm(width, groups, EPSILON, dtype=dtype, rngs=rngs)

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    b, i, j, d = x_bijd.shape
    normed_bld = self.group_norm(x_bijd).reshape(b, i * j, d)
    return x_bijd + super().__call__(normed_bld, normed_bld).reshape(b, i, j, d)


class Level(nnx.Module):
  """Resnets, then a change of size: a level of the encoder or of the decoder."""

  def __init__(self, inputs: int, outputs: int, count: int, groups: int, *, down: bool = False,
               up: bool = False, dtype, rngs: nnx.Rngs):
    own = dict(dtype=dtype, rngs=rngs)
    self.resnets = nnx.List([
      layers.ResnetBlock2D(outputs if n else inputs, outputs, groups, EPSILON, **own) for n in range(count)])
    # Zeros after the last row and column alone: the reference pads so here, unlike in its UNet.
    self.downsamplers = nnx.List([layers.Downsample2D(outputs, [(0, 1)] * 2, **own)] if down else [])
    self.upsamplers = nnx.List([layers.Upsample2D(outputs, **own)] if up else [])

  def order(self) -> list[nnx.Module]:
    """The layers in the order in which they run."""
    return [*self.resnets, *self.downsamplers, *self.upsamplers]


class MidBlock(nnx.Module):
  """Resnet, attention where the config wants one, resnet."""

  def __init__(self, width: int, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
    own, groups = dict(dtype=dtype, rngs=rngs), config.norm_num_groups
    self.resnets = nnx.List([layers.ResnetBlock2D(width, width, groups, EPSILON, **own) for _ in range(2)])
    self.attentions = nnx.List([PixelAttention(width, groups, **own)] * config.mid_block_add_attention)

  def order(self) -> list[nnx.Module]:
    """The layers in the order in which they run."""
    return [self.resnets[0], *self.attentions, self.resnets[1]]


class Tower(nnx.Module):
  """Convolution, blocks, norm, convolution: what encoder and decoder share."""

  def __init__(self, inputs: int, outputs: int, widths: tuple[int, ...], config: VAEConfig, *, dtype,
               remat: bool, rngs: nnx.Rngs):
    self.remat = remat
    self.conv_in = layers.conv(inputs, widths[0], 3, dtype=dtype, rngs=rngs)
    last = dict(dtype=jnp.float32, rngs=rngs)
    self.conv_norm_out = layers.group_norm(widths[-1], config.norm_num_groups, EPSILON, **last)
    self.conv_out = layers.conv(widths[-1], outputs, 3, **last)

  def run(self, x_bijd: jax.Array, blocks) -> jax.Array:
    """The whole tower, with the layers of `blocks` in the middle."""
    x_bijd = self.conv_in(x_bijd)
    for block in blocks:
      for layer in block.order():
        x_bijd = layers.call(operator.call, layer, x_bijd, remat=self.remat)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x_bijd)))


class Encoder(Tower):
  """Images to mean and log variance, side by side in the last axis."""

  def __init__(self, config: VAEConfig, *, dtype, remat: bool, rngs: nnx.Rngs):
    widths, own = config.block_out_channels, dict(dtype=dtype, rngs=rngs)
    super().__init__(config.in_channels, 2 * config.latent_channels, widths, config, remat=remat, **own)
    self.down_blocks = nnx.List([
      Level(inputs, outputs, config.layers_per_block, config.norm_num_groups, down=n < len(widths), **own)
      for n, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths), 1)])
    self.mid_block = MidBlock(widths[-1], config, **own)

  def __call__(self, images_bhwc: jax.Array) -> jax.Array:
    return self.run(images_bhwc, [*self.down_blocks, self.mid_block])


class Decoder(Tower):
  """Latents to images."""

  def __init__(self, config: VAEConfig, *, dtype, remat: bool, rngs: nnx.Rngs):
    widths, own = config.block_out_channels[::-1], dict(dtype=dtype, rngs=rngs)
    super().__init__(config.latent_channels, config.out_channels, widths, config, remat=remat, **own)
    self.mid_block = MidBlock(widths[0], config, **own)
    self.up_blocks = nnx.List([
      Level(inputs, outputs, config.layers_per_block + 1, config.norm_num_groups, up=n < len(widths), **own)
      for n, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths), 1)])

  def __call__(self, latents_bhwz: jax.Array) -> jax.Array:
    return self.run(latents_bhwz, [self.mid_block, *self.up_blocks])


class AutoencoderKL(nnx.Module):
  """Images to latents of an eighth of their size (four levels) and back.

  `scaling_factor` is for the caller: the UNet's latents are `scaling_factor` times the ones here.
  """

  def __init__(self, config: VAEConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
    self.config = config
    self.scaling_factor = config.scaling_factor
    z, last = config.latent_channels, dict(dtype=jnp.float32, rngs=rngs)
    self.encoder = Encoder(config, dtype=dtype, remat=remat, rngs=rngs)
    self.decoder = Decoder(config, dtype=dtype, remat=remat, rngs=rngs)
    self.quant_conv = layers.conv(2 * z, 2 * z, 1, **last) if config.use_quant_conv else None
    self.post_quant_conv = layers.conv(z, z, 1, **last) if config.use_post_quant_conv else None

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, remat: bool = False,
                rngs: nnx.Rngs) -> "AutoencoderKL":
    """Builds the module of a parsed `vae/config.json`; see `VAEConfig.from_json` for errors.

    Args:
      config: the parsed file.
      dtype: of the computation; softmax, norms and the last layers are float32 in any case.
      remat: compute each layer's activations again in the backward pass instead of keeping them.
      rngs: for fresh weights; `hub.abstract` makes none.
    """
    return cls(VAEConfig.from_json(config), dtype=dtype, remat=remat, rngs=rngs)

  @staticmethod
  def canonical_name(name: str) -> str | None:
    """The present name of a parameter; attention had other names in folders of before 2023."""
    path, layer, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", name)
    return f"{path}.{RENAMED[layer]}.{kind}" if layer in RENAMED and ".attentions." in name else name

  @property
  def factor(self) -> int:
    """Height of an image in units of its latents' height."""
    return 2 ** (len(self.config.block_out_channels) - 1)

  def encode(self, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `(mean_bhwz, logvar_bhwz)` of the unscaled latents; images are in [-1, 1]."""
    moments_bhwz = self.encoder(images_bhwc)
    if self.quant_conv is not None:
      moments_bhwz = self.quant_conv(moments_bhwz)
    mean_bhwz, logvar_bhwz = jnp.split(moments_bhwz, 2, axis=-1)
    return mean_bhwz, jnp.clip(logvar_bhwz, -30, 20)

  def decode(self, latents_bhwz: jax.Array) -> jax.Array:
    """Returns `images_bhwc`, about [-1, 1] but not clipped, of unscaled latents."""
    if self.post_quant_conv is not None:
      latents_bhwz = self.post_quant_conv(latents_bhwz)
    return self.decoder(latents_bhwz)
