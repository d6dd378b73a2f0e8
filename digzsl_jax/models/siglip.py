"""SigLIP (arXiv 2303.15343) in the parameter names of Hugging Face transformers.

Towers of CLIP's layers without a class position and without a causal mask: an image is pooled by a learnt
query, a text at its last position. Ids of texts come from the checkpoint's own SentencePiece tokenizer,
padded to 64; `data/tokenizer.py` is CLIP's and does not read it.

Shapes: b batch, l m positions, h heads, d width of a tower, p width of the shared space,
i j height and width in pixels or patches, c colours.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import clip, layers
from digzsl_jax.models.attention import attention


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """What the text tower needs of a `config.json`; the defaults are those of transformers."""

  vocab_size: int = 32000
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 64
  hidden_act: str = "gelu_pytorch_tanh"
  layer_norm_eps: float = 1e-6
  projection_size: int | None = None  # None: hidden_size

  @classmethod
  def from_json(cls, config: Mapping) -> "TextConfig":
    return cls(**layers.known_fields(cls, config))


@dataclasses.dataclass(frozen=True)
class VisionConfig(clip.VisionConfig):
  """What the vision tower needs of a `config.json`; the defaults are those of transformers."""

  patch_size: int = 16
  hidden_act: str = "gelu_pytorch_tanh"
  layer_norm_eps: float = 1e-6

  @classmethod
  def from_json(cls, config: Mapping) -> "VisionConfig":
    """Reads the config of the tower, or of both towers."""
    return cls(**layers.known_fields(cls, config.get("vision_config", config)))


class VisionEmbeddings(nnx.Module):
  """Images `[b, i, j, c]` to positions `[b, l, d]`, the patches row by row."""

  def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
    width, patch = config.hidden_size, config.patch_size
    self.image_size = config.image_size
    self.patch_embedding = layers.conv(config.num_channels, width, patch, stride=patch, padding=0, dtype=dtype,
                                       rngs=rngs)
    self.position_embedding = layers.embedding((config.image_size // patch)**2, width, dtype=dtype, rngs=rngs)

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    b, i, j, _ = images_bijc.shape
    if (i, j) != (self.image_size, self.image_size):
      raise ValueError(f"images of {i}x{j} pixels for a model of image_size {self.image_size}: resize them")
    patches_bijd = self.patch_embedding(images_bijc)
    x_bld = patches_bijd.reshape(b, -1, patches_bijd.shape[-1])
    return x_bld + self.position_embedding(jnp.arange(x_bld.shape[1]))


class PackedAttention(nnx.Module):
  """PyTorch's `MultiheadAttention`: the three projections stacked in one matrix `[3 d, d]`."""

  def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
    self.heads, self.dtype = heads, layers.types(dtype)[0]
    self.in_proj_weight = layers.parameter(nnx.initializers.xavier_uniform(), (3 * width, width), rngs=rngs)
    self.in_proj_bias = layers.parameter(nnx.initializers.zeros, (3 * width,), rngs=rngs)
    self.out_proj = layers.linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, query_bld: jax.Array, x_bmd: jax.Array) -> jax.Array:
    kernels = jnp.split(self.in_proj_weight[...].astype(self.dtype).T, 3, axis=1)
    biases = jnp.split(self.in_proj_bias[...].astype(self.dtype), 3)
    q, k, v = (layers.split_heads(inputs @ kernel + bias, self.heads)
               for inputs, kernel, bias in zip((query_bld, x_bmd, x_bmd), kernels, biases))
    out_blhd, _ = attention(q, k, v)
    return self.out_proj(out_blhd.reshape(query_bld.shape))


class PoolingHead(nnx.Module):
  """All positions to one by the attention of a learnt query, and feed-forward (MAP head, arXiv 2106.04560)."""

  def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
    width = config.hidden_size
    self.probe = layers.parameter(nnx.initializers.xavier_uniform(), (1, 1, width), rngs=rngs)
    self.attention = PackedAttention(width, config.num_attention_heads, dtype=dtype, rngs=rngs)
    self.layernorm = layers.layer_norm(width, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.mlp = clip.MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x_bmd: jax.Array) -> jax.Array:
    probe_b1d = jnp.broadcast_to(self.probe[...].astype(x_bmd.dtype), (x_bmd.shape[0], 1, x_bmd.shape[-1]))
    pooled_b1d = self.attention(probe_b1d, x_bmd)
    return (pooled_b1d + self.mlp(self.layernorm(pooled_b1d)))[:, 0]


class SiglipVisionModel(nnx.Module):
  """The vision tower, alone or out of a folder with both.

  Attributes:
    width: of the pooled feature.
    image_size: height and width of the images that it takes.
  """

  def __init__(self, config: VisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.width, self.image_size = config.hidden_size, config.image_size
    self.embeddings = VisionEmbeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = clip.Encoder(config, dtype=dtype, rngs=rngs)
    self.post_layernorm = layers.layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.head = PoolingHead(config, dtype=dtype, rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "SiglipVisionModel":
    return cls(VisionConfig.from_json(config), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(name: str) -> str | None:
    """The attribute path of a checkpoint key; None for what belongs to the text tower or to both."""
    return None if name.startswith(("text_model.", "logit_")) else name.removeprefix("vision_model.")

  @staticmethod
  def reference_name(name: str) -> str:
    """The checkpoint key of an attribute path."""
    return f"vision_model.{name}"

  def __call__(self, images_bijc: jax.Array) -> tuple[jax.Array, dict]:
    """Encodes a batch of images, normalised as the checkpoint's `preprocessor_config.json` says.

    Returns:
      `(pooled_bd, out)`: the pooled image, which is its embedding too (p = d), and `out` with "hidden",
      "attention" and "values" as in `clip.CLIPVisionModel` and "patches" (`[b, l, d]`, all positions after
      the last norm).

    Raises:
      ValueError: images of another size than the model's.
    """
    x_bld, out = self.encoder(self.embeddings(images_bijc))
    x_bld = self.post_layernorm(x_bld)
    return self.head(x_bld), out | {"patches": x_bld}


class SiglipTextModel(nnx.Module):
  """The text tower."""

  def __init__(self, config: TextConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    width = config.hidden_size
    self.embeddings = clip.TextEmbeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = clip.Encoder(config, dtype=dtype, rngs=rngs)
    self.final_layer_norm = layers.layer_norm(width, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.head = layers.linear(width, config.projection_size or width, dtype=dtype, rngs=rngs)

  def __call__(self, ids_bl: jax.Array) -> tuple[jax.Array, dict]:
    """Encodes a batch of texts, all padded to the length of training: padding is attended to.

    Returns:
      `(embeds_bp, out)`: the last position, projected, and `out` with "hidden", "attention" and "values" as
      in `clip.CLIPTextModel` and "last" (`[b, l, d]`, all positions after the last norm).

    Raises:
      ValueError: more tokens than position embeddings.
    """
    x_bld, out = self.encoder(self.embeddings(self.embeddings.token_embedding(ids_bl)))
    x_bld = self.final_layer_norm(x_bld)
    return self.head(x_bld[:, -1]), out | {"last": x_bld}


class SiglipModel(nnx.Module):
  """Both towers; call `text_model` and `vision_model`.

  The logit of a pair is `exp(logit_scale) * cosine + logit_bias`, and every pair has its own sigmoid.
  """

  def __init__(self, text: TextConfig, vision: VisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.text_model = SiglipTextModel(text, dtype=dtype, rngs=rngs)
    self.vision_model = SiglipVisionModel(vision, dtype=dtype, rngs=rngs)
    # Both start as in section 3.2.
    self.logit_scale = layers.parameter(nnx.initializers.constant(np.log(10)), (1,), rngs=rngs)
    self.logit_bias = layers.parameter(nnx.initializers.constant(-10), (1,), rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "SiglipModel":
    text, vision = TextConfig.from_json(config["text_config"]), VisionConfig.from_json(config)
    return cls(text, vision, dtype=dtype, rngs=rngs)
