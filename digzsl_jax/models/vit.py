"""Vision transformer (arXiv 2010.11929) in the parameter names of Hugging Face checkpoints.

Shapes: b batch, l m positions, h heads, d width, k classes, i j height and width in pixels or
patches, c colours.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import layers
from digzsl_jax.models.attention import attention


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """What the model needs of a `config.json`; the defaults are those of transformers (ViT-B/16)."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 16
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12
  qkv_bias: bool = True

  @classmethod
  def from_json(cls, config: Mapping) -> "ViTConfig":
    return cls(**layers.known_fields(cls, config))


class PatchEmbeddings(nnx.Module):
  """The convolution that makes patches, where checkpoints have it."""

  def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
    self.projection = layers.conv(config.num_channels, config.hidden_size, config.patch_size,
                                  stride=config.patch_size, padding=0, dtype=dtype, rngs=rngs)


class Embeddings(nnx.Module):
  """Images `[b, i, j, c]` to positions `[b, l, d]`: the class position, then the patches row by row."""

  def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
    width, length = config.hidden_size, (config.image_size // config.patch_size)**2 + 1
    self.image_size, self.dtype = config.image_size, layers.types(dtype)[1]
    self.cls_token = layers.parameter(nnx.initializers.normal(0.02), (1, 1, width), rngs=rngs)
    self.position_embeddings = layers.parameter(nnx.initializers.normal(0.02), (1, length, width), rngs=rngs)
    self.patch_embeddings = PatchEmbeddings(config, dtype=dtype, rngs=rngs)

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    b, i, j, _ = images_bijc.shape
    positions_1ld = self.positions(i, j).astype(self.dtype)
    patches_bijd = self.patch_embeddings.projection(images_bijc)
    width = patches_bijd.shape[-1]
    class_b1d = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (b, 1, width))
    return jnp.concatenate([class_b1d, patches_bijd.reshape(b, -1, width)], axis=1) + positions_1ld

  def positions(self, i: int, j: int) -> jax.Array:
    """Position embeddings `[1, l, d]` of images of `i` times `j` pixels."""
    if (i, j) != (self.image_size, self.image_size):
      raise ValueError(f"images of {i}x{j} pixels for a model of image_size {self.image_size}: resize them")
    return self.position_embeddings[...]


class Projections(nnx.Module):
  """Queries, keys and values, where checkpoints have them."""

  def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
    width, bias = config.hidden_size, config.qkv_bias
    own = dict(bias=bias, dtype=layers.types(dtype)[0], rngs=rngs)
    self.query = layers.linear(width, width, **own)
    self.key = layers.linear(width, width, **own)
    self.value = layers.linear(width, width, **own)


class Dense(nnx.Module):
  """A linear layer, one level down as checkpoints have it."""

  def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
    self.dense = layers.linear(inputs, outputs, dtype=dtype, rngs=rngs)


class SelfAttention(nnx.Module):
  """Multi-head self-attention that shows its weights.

  Raises:
    ValueError: the number of heads does not divide the width.
  """

  def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
    self.heads = config.num_attention_heads
    if config.hidden_size % self.heads:
      raise ValueError(f"num_attention_heads {self.heads} does not divide hidden_size {config.hidden_size}")
    self.attention = Projections(config, dtype=dtype, rngs=rngs)
    self.output = Dense(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> tuple[jax.Array, jax.Array]:
    projections = self.attention.query, self.attention.key, self.attention.value
    q, k, v = (layers.split_heads(project(x_bld), self.heads) for project in projections)
    out_blhd, weights_bhlm = attention(q, k, v)
    return self.output.dense(out_blhd.reshape(x_bld.shape)), weights_bhlm


class Layer(nnx.Module):
  """Attention, then feed-forward, each after a norm and beside a shortcut."""

  def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
    width, inner = config.hidden_size, config.intermediate_size
    self.activation = layers.activation(config.hidden_act)
    self.layernorm_before = layers.layer_norm(width, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.attention = SelfAttention(config, dtype=dtype, rngs=rngs)
    self.layernorm_after = layers.layer_norm(width, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.intermediate = Dense(width, inner, dtype=dtype, rngs=rngs)
    self.output = Dense(inner, width, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> tuple[jax.Array, jax.Array]:
    attended_bld, weights_bhlm = self.attention(self.layernorm_before(x_bld))
    x_bld += attended_bld
    inner_bld = self.activation(self.intermediate.dense(self.layernorm_after(x_bld)))
    return x_bld + self.output.dense(inner_bld), weights_bhlm


class Encoder(nnx.Module):
  """Layers one after another; `out` has "hidden" and "attention", as in `ViT`."""

  def __init__(self, layer: list[nnx.Module]):
    self.layer = nnx.List(layer)

  def __call__(self, x_bld: jax.Array) -> tuple[jax.Array, dict]:
    out = {"hidden": [x_bld], "attention": []}
    for layer in self.layer:
      x_bld, weights_bhlm = layer(x_bld)
      out["hidden"].append(x_bld)
      out["attention"].append(weights_bhlm)
    return x_bld, out


class ViT(nnx.Module):
  """Vision transformer whose class position is the feature of an image.

  Attributes:
    width: of the feature.
    image_size: height and width of the images that it takes.
  """

  def __init__(self, config: ViTConfig, *, classes: int = 0, dtype=jnp.float32, rngs: nnx.Rngs):
    self.width, self.image_size = config.hidden_size, config.image_size
    self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = Encoder([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
    self.layernorm = layers.layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.classifier = layers.linear(config.hidden_size, classes, dtype=dtype, rngs=rngs) if classes else None

  @classmethod
  def from_json(cls, config: Mapping, *, classifier: bool = False, dtype=jnp.float32,
                rngs: nnx.Rngs) -> "ViT":
    """`classifier` keeps the checkpoint's head; otherwise it is left out, in the file too."""
    classes = len(config.get("id2label") or (0, 1)) if classifier else 0  # transformers leaves out two labels
    return cls(ViTConfig.from_json(config), classes=classes, dtype=dtype, rngs=rngs)

  def canonical_name(self, name: str) -> str | None:
    """The attribute path of a checkpoint key; None for heads that this model leaves out."""
    name = name.removeprefix("vit.")
    is_dropped = name.startswith("pooler.") or name.startswith("classifier.") and self.classifier is None
    return None if is_dropped else name

  def reference_name(self, name: str) -> str:
    """The checkpoint key of an attribute path."""
    # transformers keeps the backbone under `vit.` only where a head stands beside it.
    return name if self.classifier is None or name.startswith("classifier.") else f"vit.{name}"

  def __call__(self, images_bijc: jax.Array) -> tuple[jax.Array, dict]:
    """Encodes images normalised as the checkpoint's `preprocessor_config.json` says.

    Returns:
      `(feature_bd, out)`: the class position after the last norm, and `out` with "hidden" (the
      embeddings and every layer's output), "attention" (`[b, h, l, m]` of every layer), "patches"
      (`[b, l-1, d]`, the other positions after the last norm) and, with a classifier, "logits" `[b, k]`.

    Raises:
      ValueError: images of another size than the model's.
    """
    x_bld, out = self.encoder(self.embeddings(images_bijc))
    x_bld = self.layernorm(x_bld)
    out["patches"] = x_bld[:, 1:]
    if self.classifier is not None:
      out["logits"] = self.classifier(x_bld[:, 0])
    return x_bld[:, 0], out
