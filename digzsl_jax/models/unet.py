"""The denoiser of Stable Diffusion 1.x and 2.x, equal to diffusers' `UNet2DConditionModel`.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752).
Attribute paths are the parameter names of a diffusers folder `unet/`.

Shapes: b batch, h w latent height and width, z latent channel, i j height and width inside,
l pixel or text position, d width.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import layers

# What a config may say of the switches we do not have; None always means "off".
ONLY = {
  "act_fn": ("silu", "swish"), "addition_embed_type": (), "attention_type": ("default",),
  "center_input_sample": (False,), "class_embed_type": (), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
  "cross_attention_norm": (), "downsample_padding": (1,), "dropout": (0,), "dual_cross_attention": (False,),
  "encoder_hid_dim": (), "encoder_hid_dim_type": (), "mid_block_only_cross_attention": (False,),
  "num_class_embeds": (), "only_cross_attention": (False,), "resnet_out_scale_factor": (1,),
  "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
  "reverse_transformer_layers_per_block": (), "time_cond_proj_dim": (), "time_embedding_act_fn": (),
  "time_embedding_dim": (), "time_embedding_type": ("positional",), "timestep_post_act": (),
  "transformer_layers_per_block": (1,),
}
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # does it attend to the text?
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID = "UNetMidBlock2DCrossAttn"


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The fields of `unet/config.json` that Stable Diffusion 1.x and 2.x use; diffusers' defaults."""
  sample_size: int = 64
  in_channels: int = 4
  out_channels: int = 4
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  heads: tuple[int, ...] = (8, 8, 8, 8)
  cross_attention_dim: int = 1280
  use_linear_projection: bool = False
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  mid_block_scale_factor: float = 1.0
  flip_sin_to_cos: bool = True
  freq_shift: float = 0

  @classmethod
  def from_json(cls, config: Mapping) -> "UNetConfig":
    """Reads a parsed `unet/config.json`; fields that change nothing here are passed over.

    Raises:
      ValueError: the config names something outside Stable Diffusion 1.x and 2.x.
    """
    def bad(field, remedy):
      return ValueError(f"UNet config: {field}={config.get(field)!r} is not supported; {remedy}")

    for field, allowed in ONLY.items():
      given = config.get(field)
      for value in given if isinstance(given, (list, tuple)) else [given]:
        if value is not None and value not in allowed:
          raise bad(field, f"Stable Diffusion 1.x and 2.x have {' or '.join(map(repr, allowed or [None]))}")
    if config.get("mid_block_type", MID) != MID:
      raise bad("mid_block_type", f"expected {MID!r}")
    new = layers.read_config(cls, config, "UNet")
    widths = new.block_out_channels
    # A misnomer that diffusers keeps for the sake of old configs: `attention_head_dim` counts heads.
    field = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    heads = config.get(field, 8)
    heads = tuple(heads) if isinstance(heads, (list, tuple)) else (heads,) * len(widths)
    fits = [isinstance(n, int) and n > 0 and c % n == 0 for c, n in zip(widths, heads)]
    if len(heads) != len(widths) or not all(fits):
      raise bad(field, f"it counts heads: one divisor for each of block_out_channels={widths}")
    if any(c % new.norm_num_groups for c in widths):
      raise bad("norm_num_groups", f"it must divide each of block_out_channels={widths}")
    for field, types in ("down_block_types", DOWN), ("up_block_types", UP):
      if len(getattr(new, field)) != len(widths) or not set(getattr(new, field)) <= set(types):
        raise bad(field, f"expected one of {sorted(types)} for each of block_out_channels={widths}")
    return dataclasses.replace(new, heads=heads)


class TimestepEmbedding(nnx.Module):
  """Two linear layers with SiLU between them, from `timestep_waves` to what every resnet takes."""

  def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
    self.linear_1 = layers.linear(inputs, outputs, dtype=dtype, rngs=rngs)
    self.linear_2 = layers.linear(outputs, outputs, dtype=dtype, rngs=rngs)

  def __call__(self, waves_bd: jax.Array) -> jax.Array:
    return self.linear_2(jax.nn.silu(self.linear_1(waves_bd)))


class GEGLU(nnx.Module):
  """Gated linear unit (Shazeer, arXiv 2002.05202) with the exact, not the tanh, GELU."""

  def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
    self.proj = layers.linear(inputs, 2 * outputs, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> jax.Array:
    x_bld, gate_bld = jnp.split(self.proj(x_bld), 2, axis=-1)
    return x_bld * jax.nn.gelu(gate_bld, approximate=False)


class FeedForward(nnx.Module):
  """GEGLU to four times the width, and linearly back."""

  def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
    # The reference holds its dropout at index 1.
    self.net = nnx.List([GEGLU(width, 4 * width, dtype=dtype, rngs=rngs), None,
                         layers.linear(4 * width, width, dtype=dtype, rngs=rngs)])

  def __call__(self, x_bld: jax.Array) -> jax.Array:
    return layers.in_parts(lambda x_nd: self.net[2](self.net[0](x_nd)), x_bld)


class BasicTransformerBlock(nnx.Module):
  """Attention among pixels, attention of pixels to the text, feed-forward."""

  def __init__(self, width: int, text: int, heads: int, *, dtype, rngs: nnx.Rngs):
    self.norm1 = layers.layer_norm(width, 1e-5, dtype=dtype, rngs=rngs)
    self.attn1 = layers.Attention(width, width, heads, bias=False, dtype=dtype, rngs=rngs)
    self.norm2 = layers.layer_norm(width, 1e-5, dtype=dtype, rngs=rngs)
    self.attn2 = layers.Attention(width, text, heads, bias=False, dtype=dtype, rngs=rngs)
    self.norm3 = layers.layer_norm(width, 1e-5, dtype=dtype, rngs=rngs)
    self.ff = FeedForward(width, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array, text_bld: jax.Array) -> jax.Array:
    normed_bld = self.norm1(x_bld)
    x_bld += self.attn1(normed_bld, normed_bld)
    x_bld += self.attn2(self.norm2(x_bld), text_bld)
    return x_bld + self.ff(self.norm3(x_bld))


class Transformer2DModel(nnx.Module):
  """A transformer block over all pixels, between two projections and beside a shortcut."""

  def __init__(self, width: int, heads: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
    def project():
      if config.use_linear_projection:
        return layers.linear(width, width, dtype=dtype, rngs=rngs)
      return layers.conv(width, width, 1, dtype=dtype, rngs=rngs)

    self.norm = layers.group_norm(width, config.norm_num_groups, 1e-6, dtype=dtype, rngs=rngs)
    self.proj_in = project()
    self.transformer_blocks = nnx.List([
      BasicTransformerBlock(width, config.cross_attention_dim, heads, dtype=dtype, rngs=rngs)])
    self.proj_out = project()

  def __call__(self, x_bijd: jax.Array, text_bld: jax.Array) -> jax.Array:
    b, i, j, d = x_bijd.shape
    hidden_bld = self.proj_in(self.norm(x_bijd)).reshape(b, i * j, d)
    hidden_bld = self.transformer_blocks[0](hidden_bld, text_bld)
    return x_bijd + self.proj_out(hidden_bld.reshape(b, i, j, d))


def _layer(modules, time_bd: jax.Array, text_bld: jax.Array, *parts_bijd: jax.Array) -> jax.Array:
  resnet, attention = modules
  x_bijd = resnet(jnp.concatenate(parts_bijd, -1), time_bd)
  return x_bijd if attention is None else attention(x_bijd, text_bld)


class Block(nnx.Module):
  """Resnets, each with its attention to the text or None: what the three kinds of block share."""

  def __init__(self, widths: list[tuple[int, int]], heads: list[int | None], config: UNetConfig, *,
               scale: float = 1.0, dtype, remat: bool, rngs: nnx.Rngs):
    self.remat = remat
    time = 4 * config.block_out_channels[0]
    self.resnets = nnx.List([
      layers.ResnetBlock2D(inputs, outputs, config.norm_num_groups, config.norm_eps, time=time, scale=scale,
                           dtype=dtype, rngs=rngs) for inputs, outputs in widths])
    self.attentions = nnx.List([
      n and Transformer2DModel(outputs, n, config, dtype=dtype, rngs=rngs)
      for n, (_, outputs) in zip(heads, widths)])

  def layer(self, n: int, time_bd: jax.Array, text_bld: jax.Array, *parts_bijd: jax.Array) -> jax.Array:
    """Resnet `n` on the parts, joined along their channels, and its attention where there is one."""
    pair = self.resnets[n], self.attentions[n]
    return layers.call(_layer, pair, time_bd, text_bld, *parts_bijd, remat=self.remat)


class DownBlock(Block):
  """`CrossAttnDownBlock2D`, or `DownBlock2D` where heads are None."""

  def __init__(self, widths, heads, config, *, last: bool, dtype, remat: bool, rngs: nnx.Rngs):
    super().__init__(widths, heads, config, dtype=dtype, remat=remat, rngs=rngs)
    self.downsamplers = nnx.List([] if last else [
      layers.Downsample2D(widths[-1][1], 1, dtype=dtype, rngs=rngs)])

  @property
  def steps(self) -> int:
    """Layers, and the downsampler where there is one."""
    return len(self.resnets) + len(self.downsamplers)

  def step(self, n: int, x_bijd: jax.Array, time_bd: jax.Array, text_bld: jax.Array) -> jax.Array:
    """Layer `n`, or after the last layer the downsampler; its output is a skip."""
    if n == len(self.resnets):
      return self.downsamplers[0](x_bijd)
    return self.layer(n, time_bd, text_bld, x_bijd)


class MidBlock(Block):
  """`UNetMidBlock2DCrossAttn`: resnet, attention, resnet."""

  def __call__(self, x_bijd: jax.Array, time_bd: jax.Array, text_bld: jax.Array) -> jax.Array:
    for n in range(2):
      x_bijd = self.layer(n, time_bd, text_bld, x_bijd)
    return x_bijd


class UpBlock(Block):
  """`CrossAttnUpBlock2D`, or `UpBlock2D` where heads are None."""

  def __init__(self, widths, heads, config, *, last: bool, dtype, remat: bool, rngs: nnx.Rngs):
    super().__init__(widths, heads, config, dtype=dtype, remat=remat, rngs=rngs)
    self.upsamplers = nnx.List([] if last else [layers.Upsample2D(widths[-1][1], dtype=dtype, rngs=rngs)])

  @property
  def steps(self) -> int:
    """Layers."""
    return len(self.resnets)

  def step(self, n: int, x_bijd: jax.Array, skips: list[jax.Array], time_bd: jax.Array,
           text_bld: jax.Array) -> jax.Array:
    """Layer `n`, which takes its skip off the end of the list, and the upsampler after the last layer."""
    x_bijd = self.layer(n, time_bd, text_bld, x_bijd, skips.pop())
    for up in self.upsamplers if n + 1 == self.steps else ():
      x_bijd = up(x_bijd, skips[-1].shape[1:3])
    return x_bijd


class UNet2DConditionModel(nnx.Module):
  """Predicts the noise in latents (or the velocity: the checkpoint's scheduler config says which)."""

  def __init__(self, config: UNetConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
    self.config = config
    own = dict(dtype=dtype, rngs=rngs)
    widths, count = config.block_out_channels, config.layers_per_block
    last = len(widths) - 1
    self.conv_in = layers.conv(config.in_channels, widths[0], 3, **own)
    self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], **own)

    skips, width = [widths[0]], widths[0]
    self.down_blocks = nnx.List()
    for level, (kind, outputs) in enumerate(zip(config.down_block_types, widths)):
      pairs = [(width, outputs)] + [(outputs, outputs)] * (count - 1)
      heads = [config.heads[level] if DOWN[kind] else None] * count
      self.down_blocks.append(DownBlock(pairs, heads, config, last=level == last, remat=remat, **own))
      skips += [outputs] * (count if level == last else count + 1)
      width = outputs

    self.mid_block = MidBlock([(width, width)] * 2, [config.heads[-1], None], config,
                              scale=config.mid_block_scale_factor, remat=remat, **own)

    self.up_blocks = nnx.List()
    for level, kind in zip(range(last, -1, -1), config.up_block_types):
      outputs, pairs = widths[level], []
      for _ in range(count + 1):
        pairs.append((width + skips.pop(), outputs))
        width = outputs
      heads = [config.heads[level] if UP[kind] else None] * (count + 1)
      self.up_blocks.append(UpBlock(pairs, heads, config, last=level == 0, remat=remat, **own))

    self.conv_norm_out = layers.group_norm(width, config.norm_num_groups, config.norm_eps, **own)
    self.conv_out = layers.conv(width, config.out_channels, 3, **own)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, remat: bool = False,
                rngs: nnx.Rngs) -> "UNet2DConditionModel":
    """Builds the module of a parsed `unet/config.json`; see `UNetConfig.from_json` for errors.

    Args:
      config: the parsed file.
      dtype: of the computation; softmax and the norms' statistics are float32 in any case.
      remat: compute each layer's activations again in the backward pass instead of keeping them.
      rngs: for fresh weights; `hub.abstract` makes none.
    """
    return cls(UNetConfig.from_json(config), dtype=dtype, remat=remat, rngs=rngs)

  def __call__(self, latents_bhwz: jax.Array, timesteps_b: jax.Array, text_bld: jax.Array) -> jax.Array:
    """Predicts the noise.

    Args:
      latents_bhwz: noisy latents of any height and width, scaled by the VAE's `scaling_factor`.
      timesteps_b: one time per row, in the scheduler's steps (0 to 999), or one for all.
      text_bld: text encoder states, d = `cross_attention_dim`.

    Returns:
      `eps_bhwz` in the dtype of the computation.
    """
    return self.predict(latents_bhwz, timesteps_b, text_bld)[0]

  @property
  def branches(self) -> int:
    """How many skips lead from the way down to the way up, the shallowest being branch 0."""
    return 1 + sum(block.steps for block in self.down_blocks)

  def predict(self, latents_bhwz: jax.Array, timesteps_b: jax.Array, text_bld: jax.Array,
              deep_bijd: jax.Array | None = None, branch: int = 0) -> tuple[jax.Array, jax.Array]:
    """Predicts the noise, with all of the network or with deep features of another call (DeepCache, arXiv 2312.00858).

    Args:
      latents_bhwz: as in a call; so are `timesteps_b` and `text_bld`.
      deep_bijd: features of another call with this branch, for the same rows; then only its shallow part is evaluated:
        what the skips 0 to `branch` come from and the layers that they lead to. None evaluates all.
      branch: the deepest skip of the shallow part, static.

    Returns:
      `(eps_bhwz, deep_bijd)`; the features are what the layer behind the skip `branch` takes beside it.

    Raises:
      ValueError: the text is of another width, or there is no such branch.
    """
    if text_bld.shape[-1] != self.config.cross_attention_dim:
      raise ValueError(f"text_bld is {text_bld.shape[-1]} wide but the UNet's cross_attention_dim is "
                       f"{self.config.cross_attention_dim}: the text encoder is another model's")
    if not 0 <= branch < self.branches:
      raise ValueError(f"branch is {branch}; this UNet has the branches 0 to {self.branches - 1}")
    timesteps_b = jnp.broadcast_to(timesteps_b, latents_bhwz.shape[:1])
    given = self.time_embedding(timestep_waves(timesteps_b, self.config)), text_bld
    downs, ups = ([(block, n) for block in blocks for n in range(block.steps)]
                  for blocks in (self.down_blocks, self.up_blocks))
    kept = branch + 1
    skips = [self.conv_in(latents_bhwz)]
    for block, n in downs[:branch]:
      skips.append(block.step(n, skips[-1], *given))
    if deep_bijd is None:
      for block, n in downs[branch:]:
        skips.append(block.step(n, skips[-1], *given))
      deep_bijd = self.mid_block(skips[-1], *given)
      for block, n in ups[:-kept]:
        deep_bijd = block.step(n, deep_bijd, skips, *given)
    x_bijd = deep_bijd
    for block, n in ups[-kept:]:
      x_bijd = block.step(n, x_bijd, skips, *given)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x_bijd))), deep_bijd


def timestep_waves(timesteps_b: jax.Array, config: UNetConfig) -> jax.Array:
  """Sines and cosines of the time (Vaswani et al., arXiv 1706.03762, section 3.5), `[b, d]`, float32."""
  half = config.block_out_channels[0] // 2
  # In numpy: a phase is 1000 times a frequency, so a last bit that a compiler rounds otherwise shows.
  exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
  frequencies = np.exp(exponents / np.float32(half - config.freq_shift))
  phases_bd = timesteps_b.astype(jnp.float32)[:, None] * frequencies
  waves = [jnp.sin(phases_bd), jnp.cos(phases_bd)]
  return jnp.concatenate(waves[::-1] if config.flip_sin_to_cos else waves, -1)
