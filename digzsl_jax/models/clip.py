"""CLIP (arXiv 2103.00020) in the parameter names of Hugging Face transformers.

Shapes: b batch, l m positions, h heads, d width of a tower, p width of the shared space,
i j height and width in pixels or patches, c colours.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import layers
from digzsl_jax.models.attention import attention


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """What the text tower needs of a `config.json`; the defaults are those of transformers."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407

  @classmethod
  def from_json(cls, config: Mapping) -> "TextConfig":
    return cls(**layers.known_fields(cls, config))


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """What the vision tower needs of a `config.json`; the defaults are those of transformers."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  @classmethod
  def from_json(cls, config: Mapping) -> "VisionConfig":
    return cls(**layers.known_fields(cls, config))


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Both towers and the space that they share."""

  text_config: TextConfig = TextConfig()
  vision_config: VisionConfig = VisionConfig()
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  @classmethod
  def from_json(cls, config: Mapping) -> "CLIPConfig":
    def section(name: str) -> Mapping:
      # Configs of 2021 hold every tower twice; transformers believes the `_dict` twin.
      twin = config.get(f"{name}_dict")
      return twin if twin is not None else config.get(name) or {}

    fields = layers.known_fields(cls, config)
    fields["text_config"] = TextConfig.from_json(section("text_config"))
    fields["vision_config"] = VisionConfig.from_json(section("vision_config"))
    return cls(**fields)


class SelfAttention(nnx.Module):
  """Multi-head self-attention that shows its weights and values.

  Raises:
    ValueError: the number of heads does not divide the width.
  """

  def __init__(self, config: TextConfig | VisionConfig, *, dtype, rngs: nnx.Rngs):
    self.heads = config.num_attention_heads
    width = config.hidden_size
    if width % self.heads:
      raise ValueError(f"num_attention_heads {self.heads} does not divide hidden_size {width}")
    own = dict(dtype=layers.types(dtype)[0], rngs=rngs)
    self.q_proj = layers.linear(width, width, **own)
    self.k_proj = layers.linear(width, width, **own)
    self.v_proj = layers.linear(width, width, **own)
    self.out_proj = layers.linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(out_bld, weights_bhlm, values_bld)`."""
    q_blhd, k_bmhd, v_bmhd = self.project(x_bld)
    out_blhd, weights_bhlm = attention(q_blhd, k_bmhd, v_bmhd, bias)
    return self.out_proj(out_blhd.reshape(x_bld.shape)), weights_bhlm, v_bmhd.reshape(x_bld.shape)

  def project(self, x_bld: jax.Array) -> list[jax.Array]:
    """Queries, keys and values, `[b, l, h, d]` each."""
    return [layers.split_heads(projection(x_bld), self.heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)]


class MLP(nnx.Module):
  """Two linear layers with the config's activation between them."""

  def __init__(self, config: TextConfig | VisionConfig, *, dtype, rngs: nnx.Rngs):
    self.activation = layers.activation(config.hidden_act)
    self.fc1 = layers.linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
    self.fc2 = layers.linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array) -> jax.Array:
    return self.fc2(self.activation(self.fc1(x_bld)))


class EncoderLayer(nnx.Module):
  """Attention, then feed-forward, each after a norm and beside a shortcut."""

  def __init__(self, config: TextConfig | VisionConfig, *, dtype, rngs: nnx.Rngs):
    norm = lambda: layers.layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.layer_norm1 = norm()
    self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
    self.layer_norm2 = norm()
    self.mlp = MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x_bld: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    attended_bld, weights_bhlm, values_bld = self.self_attn(self.layer_norm1(x_bld), bias)
    return self.feed_forward(x_bld + attended_bld), weights_bhlm, values_bld

  def feed_forward(self, x_bld: jax.Array) -> jax.Array:
    """The second half of the layer, residual included: TagCLIP runs it after an attention of its own."""
    return x_bld + self.mlp(self.layer_norm2(x_bld))


class Encoder(nnx.Module):
  """Layers one after another; `out` has "hidden", "attention" and "values", as in `CLIPTextModel`."""

  def __init__(self, config: TextConfig | VisionConfig, *, dtype, rngs: nnx.Rngs):
    self.layers = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs)
                            for _ in range(config.num_hidden_layers)])

  def __call__(self, x_bld: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, dict]:
    out = {"hidden": [x_bld], "attention": [], "values": []}
    for layer in self.layers:
      x_bld, weights_bhlm, values_bld = layer(x_bld, bias)
      out["hidden"].append(x_bld)
      out["attention"].append(weights_bhlm)
      out["values"].append(values_bld)
    return x_bld, out


class TextEmbeddings(nnx.Module):
  """Both tables of the text tower; a call adds positions to token embeddings `[b, l, d]`, learnt ones too."""

  def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
    width = config.hidden_size
    self.token_embedding = layers.embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
    self.position_embedding = layers.embedding(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)

  def __call__(self, embeds_bld: jax.Array) -> jax.Array:
    length, longest = embeds_bld.shape[1], self.position_embedding.num_embeddings
    if length > longest:
      raise ValueError(f"the text has {length} tokens; max_position_embeddings of the model is {longest}")
    return embeds_bld + self.position_embedding(jnp.arange(length))


class CLIPTextModel(nnx.Module):
  """The text tower, as in the `text_encoder` folder of Stable Diffusion."""

  def __init__(self, config: TextConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.dtype = layers.types(dtype)[1]
    self.eos_token_id = config.eos_token_id
    self.embeddings = TextEmbeddings(config, dtype=dtype, rngs=rngs)
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
    self.final_layer_norm = layers.layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype,
                                              rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "CLIPTextModel":
    return cls(TextConfig.from_json(config), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(name: str) -> str | None:
    """The attribute path of a checkpoint key; None for the position counter, which is no parameter."""
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else name

  @staticmethod
  def reference_name(name: str) -> str:
    """The checkpoint key of an attribute path."""
    # transformers 4 insists on the prefix, transformers 5 takes both.
    return f"text_model.{name}"

  def embed(self, ids_bl: jax.Array) -> jax.Array:
    """Token embeddings alone, `[b, l, d]`: where a learnt class token is put in."""
    return self.embeddings.token_embedding(ids_bl)

  def __call__(self, ids_bl: jax.Array, embeds_bld: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """Encodes a batch of texts.

    Args:
      ids_bl: token ids; they also tell where the text ends.
      embeds_bld: replaces the token embeddings of `ids_bl`.

    Returns:
      `(hidden_bld, out)`: the states after the final norm, and `out` with "hidden" (the embeddings
      and every layer's output, before the final norm), "attention" (`[b, h, l, m]` of every layer),
      "values" (`[b, l, d]` of every layer) and "pooled" (`[b, d]`, the state at the end of text).

    Raises:
      ValueError: more tokens than position embeddings.
    """
    embeds_bld = self.embed(ids_bl) if embeds_bld is None else embeds_bld.astype(self.dtype)
    causal_lm = jnp.tril(jnp.ones((ids_bl.shape[1],) * 2, bool))
    x_bld, out = self.encoder(self.embeddings(embeds_bld), jnp.where(causal_lm, 0, -jnp.inf))
    hidden_bld = self.final_layer_norm(x_bld)
    # Configs from before transformers 4.31 say 2 whatever the vocabulary; there the end of text is the
    # largest id.
    is_end_bl = ids_bl if self.eos_token_id == 2 else ids_bl == self.eos_token_id
    end_b = jnp.argmax(is_end_bl, axis=1)
    pooled_bd = jnp.take_along_axis(hidden_bld, end_b[:, None, None], axis=1)[:, 0]
    return hidden_bld, out | {"pooled": pooled_bd}


class VisionEmbeddings(nnx.Module):
  """Images `[b, i, j, c]` to positions `[b, l, d]`: the class position, then the patches row by row."""

  def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
    width, patch = config.hidden_size, config.patch_size
    self.image_size, self.patch_size, self.dtype = config.image_size, patch, layers.types(dtype)[1]
    self.class_embedding = layers.parameter(nnx.initializers.normal(width**-0.5), (width,), rngs=rngs)
    self.patch_embedding = layers.conv(config.num_channels, width, patch, stride=patch, padding=0, bias=False,
                                       dtype=dtype, rngs=rngs)
    self.position_embedding = layers.embedding((config.image_size // patch)**2 + 1, width, dtype=dtype, rngs=rngs)

  def __call__(self, images_bijc: jax.Array, positions_bld: jax.Array | None = None) -> jax.Array:
    """Of images of the model's size, or of any other with `positions_bld` in place of the model's own."""
    b, i, j, _ = images_bijc.shape
    if positions_bld is None and (i, j) != (self.image_size, self.image_size):
      raise ValueError(f"images of {i}x{j} pixels for a model of image_size {self.image_size}: resize them")
    patches_bijd = self.patch_embedding(images_bijc)
    width = patches_bijd.shape[-1]
    class_b1d = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, width))
    x_bld = jnp.concatenate([class_b1d, patches_bijd.reshape(b, -1, width)], axis=1)
    return x_bld + (self.position_embedding(jnp.arange(x_bld.shape[1])) if positions_bld is None else positions_bld)


class CLIPVisionModel(nnx.Module):
  """The vision tower (a ViT with a norm before its first layer).

  Attributes:
    width: of the pooled state.
    image_size: height and width of the images that it takes.
  """

  def __init__(self, config: VisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.width, self.image_size = config.hidden_size, config.image_size
    norm = lambda: layers.layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
    self.embeddings = VisionEmbeddings(config, dtype=dtype, rngs=rngs)
    self.pre_layrnorm = norm()  # sic: the name in every checkpoint
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
    self.post_layernorm = norm()

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "CLIPVisionModel":
    return cls(VisionConfig.from_json(config), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(name: str) -> str | None:
    """The attribute path of a checkpoint key; None for the position counter, which is no parameter."""
    name = name.removeprefix("vision_model.")
    return None if name == "embeddings.position_ids" else name

  @staticmethod
  def reference_name(name: str) -> str:
    """The checkpoint key of an attribute path."""
    return f"vision_model.{name}"

  def __call__(self, images_bijc: jax.Array) -> tuple[jax.Array, dict]:
    """Encodes a batch of images, normalised as the checkpoint's `preprocessor_config.json` says.

    Returns:
      `(pooled_bd, out)`: the class position after the last norm, and `out` with "hidden" (the
      embeddings and every layer's output), "attention" (`[b, h, l, m]` of every layer), "values"
      (`[b, l, d]` of every layer, heads side by side) and "patches" (`[b, l-1, d]`, the other
      positions after the last norm).

    Raises:
      ValueError: images of another size than the model's.
    """
    x_bld, out = self.encoder(self.pre_layrnorm(self.embeddings(images_bijc)))
    x_bld = self.post_layernorm(x_bld)
    return x_bld[:, 0], out | {"patches": x_bld[:, 1:]}


class CLIPModel(nnx.Module):
  """Both towers and their projections to the shared space."""

  def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    text, vision, shared = config.text_config, config.vision_config, config.projection_dim
    self.text_model = CLIPTextModel(text, dtype=dtype, rngs=rngs)
    self.vision_model = CLIPVisionModel(vision, dtype=dtype, rngs=rngs)
    self.text_projection = layers.linear(text.hidden_size, shared, bias=False, dtype=dtype, rngs=rngs)
    self.visual_projection = layers.linear(vision.hidden_size, shared, bias=False, dtype=dtype, rngs=rngs)
    self.logit_scale = layers.parameter(nnx.initializers.constant(config.logit_scale_init_value), (), rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "CLIPModel":
    return cls(CLIPConfig.from_json(config), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(name: str) -> str | None:
    """The attribute path of a checkpoint key; None for the position counters, which are no parameters."""
    return None if name.endswith(".embeddings.position_ids") else name

  def encode_text(self, ids_bl: jax.Array, embeds_bld: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """`(embeds_bp, out)` of texts, not normalised; arguments and `out` as in `CLIPTextModel`."""
    _, out = self.text_model(ids_bl, embeds_bld)
    return self.text_projection(out["pooled"]), out

  def encode_image(self, images_bijc: jax.Array) -> tuple[jax.Array, dict]:
    """`(embeds_bp, out)` of images, not normalised; arguments and `out` as in `CLIPVisionModel`."""
    pooled_bd, out = self.vision_model(images_bijc)
    return self.visual_projection(pooled_bd), out
