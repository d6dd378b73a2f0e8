"""DINOv2 (arXiv 2304.07193) in the parameter names of Hugging Face checkpoints.

A vision transformer with learnt scales on its residual branches (LayerScale, arXiv 2103.17239), trained
without labels. It takes images of any size: its position embeddings are interpolated.

Shapes: b batch, l m positions, h heads, d width, i j height and width in pixels or patches, r s those of
the position embeddings in the checkpoint, c colours.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import clip, layers, vit


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
  """What the model needs of a `config.json`; the defaults are those of transformers."""

  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  mlp_ratio: float = 4
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 14
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-6
  qkv_bias: bool = True
  use_swiglu_ffn: bool = False

  @classmethod
  def from_json(cls, config: Mapping) -> "Dinov2Config":
    return cls(**layers.known_fields(cls, config))

  @property
  def intermediate_size(self) -> int:
    return int(self.hidden_size * self.mlp_ratio)


def bicubic(size: int, new: int) -> np.ndarray:
  """Weights `[new, size]` of PyTorch's bicubic `interpolate` along one axis, without antialias.

  Cubic convolution (Keys, 1981) with a = -3/4, where `jax.image.resize` has -1/2, and the border repeated.
  """
  def near(x):  # |x| <= 1
    return (1.25 * x - 2.25) * x * x + 1

  def far(x):  # 1 <= |x| <= 2
    return ((-0.75 * x + 3.75) * x - 6) * x + 3

  # PyTorch rounds the ratio of the sizes to float32, and then each place once, by a fused multiply-add.
  places = (np.float64(np.float32(size / new)) * (np.arange(new) + 0.5) - 0.5).astype(np.float32)
  left = np.floor(places)
  t = (places - left).astype(np.float64)
  weights = np.zeros((new, size))
  for tap, weight in enumerate((far(1 + t), near(t), near(1 - t), far(2 - t)), start=-1):
    np.add.at(weights, (np.arange(new), np.clip(left.astype(int) + tap, 0, size - 1)), weight)
  return weights.astype(np.float32)


class Embeddings(vit.Embeddings):
  """Those of a ViT, for images of any height and width; rows and columns short of a patch are left out."""

  def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.patch_size, self.side = config.patch_size, config.image_size // config.patch_size

  def positions(self, i: int, j: int) -> jax.Array:
    """Position embeddings `[1, l, d]`, those of the patches interpolated to `i` times `j` pixels."""
    i, j = i // self.patch_size, j // self.patch_size
    if not i or not j:
      raise ValueError(f"images smaller than a patch of {self.patch_size}x{self.patch_size} pixels: resize them")
    positions_1ld = self.position_embeddings[...]
    if (i, j) == (self.side, self.side):
      return positions_1ld
    grid_rsd = positions_1ld[0, 1:].reshape(self.side, self.side, -1)
    grid_ijd = jnp.einsum("ir,js,rsd->ijd", bicubic(self.side, i), bicubic(self.side, j), grid_rsd)
    return jnp.concatenate([positions_1ld[:, :1], grid_ijd.reshape(1, i * j, -1)], axis=1)


class LayerScale(nnx.Module):
  """A factor for each channel."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.lambda1 = layers.parameter(nnx.initializers.ones, (width,), rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> jax.Array:
    return x_bld * self.lambda1[...].astype(x_bld.dtype)


class SwiGLU(nnx.Module):
  """Gated linear unit with SiLU (arXiv 2002.05202), two thirds as wide and a multiple of 8: the giant model's."""

  def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
    inner = (int(config.intermediate_size * 2 / 3) + 7) // 8 * 8
    self.weights_in = layers.linear(config.hidden_size, 2 * inner, dtype=dtype, rngs=rngs)
    self.weights_out = layers.linear(inner, config.hidden_size, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> jax.Array:
    gate_bld, x_bld = jnp.split(self.weights_in(x_bld), 2, axis=-1)
    return self.weights_out(jax.nn.silu(gate_bld) * x_bld)


class Layer(nnx.Module):
  """Attention, then feed-forward, each after a norm, scaled, and beside a shortcut."""

  def __init__(self, config: Dinov2Config, *, dtype, rngs: nnx.Rngs):
    width, feed_forward = config.hidden_size, SwiGLU if config.use_swiglu_ffn else clip.MLP
    self.norm1 = layers.layer_norm(width, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.attention = vit.SelfAttention(config, dtype=dtype, rngs=rngs)
    self.layer_scale1 = LayerScale(width, rngs=rngs)
    self.norm2 = layers.layer_norm(width, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.mlp = feed_forward(config, dtype=dtype, rngs=rngs)
    self.layer_scale2 = LayerScale(width, rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> tuple[jax.Array, jax.Array]:
    attended_bld, weights_bhlm = self.attention(self.norm1(x_bld))
    x_bld += self.layer_scale1(attended_bld)
    return x_bld + self.layer_scale2(self.mlp(self.norm2(x_bld))), weights_bhlm


class Dinov2Model(nnx.Module):
  """DINOv2 whose class position is the feature of an image.

  Attributes:
    width: of the feature.
    image_size: None, any size will do; a folder's `preprocessor_config.json` says which is usual (224,
      though the position embeddings of the published checkpoints are those of 518).
  """

  image_size = None

  def __init__(self, config: Dinov2Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.width = config.hidden_size
    self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = vit.Encoder([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
    self.layernorm = layers.layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "Dinov2Model":
    return cls(Dinov2Config.from_json(config), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(name: str) -> str | None:
    """The attribute path of a checkpoint key; None for what only pre-training or a classifier uses."""
    name = name.removeprefix("dinov2.")
    return None if name == "embeddings.mask_token" or name.startswith("classifier.") else name

  def __call__(self, images_bijc: jax.Array) -> tuple[jax.Array, dict]:
    """Encodes images normalised as the checkpoint's `preprocessor_config.json` says.

    Returns:
      `(feature_bd, out)`: the class position after the last norm, and `out` with "hidden" (the
      embeddings and every layer's output), "attention" (`[b, h, l, m]` of every layer) and "patches"
      (`[b, l-1, d]`, the other positions after the last norm).

    Raises:
      ValueError: images smaller than a patch.
    """
    x_bld, out = self.encoder(self.embeddings(images_bijc))
    x_bld = self.layernorm(x_bld)
    return x_bld[:, 0], out | {"patches": x_bld[:, 1:]}
