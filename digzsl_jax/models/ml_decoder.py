"""ML-Decoder (arXiv 2111.12933): labels ask the positions of an image, one query for a label or for a group of them.

A transformer decoder of one layer without self-attention: no query sees another, so their number is free, and without
dropout all that comes before the attention is the same for every image and is computed once. Of `k` queries and `b`
images what is largest is the feed-forward's middle, `b * k * 2048` numbers: 0.46 GB in float32 for 1,006 and 56.

  full       a query for each class, drawn once and never trained
  grouped    fewer queries than classes; each answers for a group of neighbouring classes
  zero-shot  queries are made of vectors that are handed in (of words, or CLIP's of prompts), all answered by the
             same projection: any number of labels, at any time

Attribute paths are the parameter names of timm's `MLDecoder`; those of the original are read as well.

Shapes: b batch, t token (position of an image), c channel of the trunk, d width of the decoder, k query, g class of a
group, n class, w width of a label's vector, h head, e width of a head, f width of the feed-forward's middle.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import hub, layers
from digzsl_jax.models.attention import softmax

EPSILON = 1e-5
XAVIER = nnx.initializers.xavier_uniform()
KERNEL = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's, of a linear layer
_MOVED = ("embed_standart.", "query_embed.", "duplicate_pooling")  # below `decoder.` in the original


@dataclasses.dataclass(frozen=True)
class MLDecoderConfig:
  """The defaults are those of the original.

  Attributes:
    classes: of the full and the grouped decoder; 0 is the zero-shot one.
    groups: queries of these, at most one for each class.
    query_width: of the vectors that the zero-shot decoder is handed.
    inputs: width of the trunk's features.
    width: of the decoder.
    heads: of its attention.
    feed_forward: width of its middle.
    dropout: share of the activations that training sets to zero.
  """

  classes: int = 0
  groups: int = 100
  query_width: int = 300
  inputs: int = 2048
  width: int = 768
  heads: int = 8
  feed_forward: int = 2048
  dropout: float = 0.1

  def __post_init__(self):
    positive = min(self.groups, self.query_width, self.inputs, self.width, self.heads, self.feed_forward) > 0
    if not positive or self.classes < 0 or self.width % self.heads or not 0 <= self.dropout < 1:
      raise ValueError(f"ML-Decoder config: {self} must have positive sizes (classes may be 0), a width that the heads "
                       "divide, and a dropout in [0, 1)")


def linear(inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs) -> layers.Linear:
  """With PyTorch's first weights and biases."""
  bound = inputs**-0.5
  bias_init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
  return layers.linear(inputs, outputs, kernel_init=KERNEL, bias_init=bias_init, dtype=dtype, rngs=rngs)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Each number is zero with probability `rate`, the others make up for it; `x` without a key."""
  if key is None:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class MultiheadAttention(nnx.Module):
  """Attention with the parameter names of PyTorch, whose first matrix holds those of queries, keys and values."""

  def __init__(self, config: MLDecoderConfig, *, dtype, rngs: nnx.Rngs):
    width, (weights, self.out) = config.width, layers.types(dtype)
    self.heads, self.dropout = config.heads, config.dropout
    self.in_proj_weight = nnx.Param(layers.first(XAVIER)(rngs.params(), (3 * width, width), weights))
    self.in_proj_bias = nnx.Param(layers.ZEROS(rngs.params(), (3 * width,), weights))
    self.out_proj = layers.linear(width, width, kernel_init=KERNEL, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, memory_btd: jax.Array, key: jax.Array | None) -> jax.Array:
    """`[b, k, d]` of queries `[b, k, d]`, or `[k, d]` that are those of every image."""
    width = x.shape[-1]
    queries = layers.split_heads(self._project(x, 0, width), self.heads)
    keys_values = self._project(memory_btd, width, 3 * width)
    keys_bthe, values_bthe = (layers.split_heads(part, self.heads) for part in jnp.split(keys_values, 2, axis=-1))
    letters = "khe" if queries.ndim == 3 else "bkhe"
    logits_bhkt = jnp.einsum(f"{letters},bthe->bhkt", queries, keys_bthe, preferred_element_type=jnp.float32)
    weights_bhkt = dropout(softmax(logits_bhkt * keys_bthe.shape[-1]**-0.5), self.dropout, key)
    out_bkhe = jnp.einsum("bhkt,bthe->bkhe", weights_bhkt.astype(values_bthe.dtype), values_bthe,
                          preferred_element_type=jnp.float32)
    return self.out_proj(out_bkhe.reshape(*out_bkhe.shape[:2], width).astype(self.out))

  def _project(self, x: jax.Array, start: int, stop: int) -> jax.Array:
    """By rows `start` to `stop` of the first matrix, in the type of the weights."""
    out = layers.product(x.reshape(-1, x.shape[-1]), self.in_proj_weight[start:stop].T) + self.in_proj_bias[start:stop]
    return out.astype(self.in_proj_weight.dtype).reshape(*x.shape[:-1], stop - start)


class DecoderLayer(nnx.Module):
  """A residual of the queries alone, attention, feed-forward, each followed by a norm."""

  def __init__(self, config: MLDecoderConfig, *, dtype, rngs: nnx.Rngs):
    own = dict(dtype=dtype, rngs=rngs)
    self.dropout = config.dropout
    self.norm1, self.norm2, self.norm3 = (layers.layer_norm(config.width, EPSILON, **own) for _ in range(3))
    self.multihead_attn = MultiheadAttention(config, **own)
    self.linear1 = linear(config.width, config.feed_forward, **own)
    self.linear2 = linear(config.feed_forward, config.width, **own)

  def __call__(self, queries_kd: jax.Array, memory_btd: jax.Array, key: jax.Array | None) -> jax.Array:
    """States `[b, k, d]`; with a key dropout makes the queries of each image others."""
    first, attended, second, middle, last = (None,) * 5 if key is None else jax.random.split(key, 5)
    x = queries_kd if key is None else jnp.broadcast_to(queries_kd, (len(memory_btd), *queries_kd.shape))
    x = self.norm1(x + dropout(x, self.dropout, first))
    x_bkd = x + dropout(self.multihead_attn(x, memory_btd, attended), self.dropout, second)
    x_bkd = self.norm2(x_bkd)
    middle_bkf = dropout(jax.nn.relu(self.linear1(x_bkd)), self.dropout, middle)
    return self.norm3(x_bkd + dropout(self.linear2(middle_bkf), self.dropout, last))


class Decoder(nnx.Module):
  """The layer, where checkpoints have it."""

  def __init__(self, config: MLDecoderConfig, *, dtype, rngs: nnx.Rngs):
    self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs)])


class Queries(nnx.Module):
  """Queries that are drawn once and never trained, hence no parameter."""

  def __init__(self, queries: int, width: int, *, rngs: nnx.Rngs):
    self.weight = nnx.BatchStat(layers.first(nnx.initializers.normal(1.0))(rngs.params(), (queries, width)))


class MLDecoder(nnx.Module):
  """Features of an image to the logits of labels.

  Attributes:
    config: sizes.
  """

  def __init__(self, config: MLDecoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    own, width = dict(dtype=dtype, rngs=rngs), config.width
    self.config, out = config, layers.types(dtype)[1]
    self.embed_standart = linear(config.inputs, width, **own)
    self.decoder = Decoder(config, **own)
    queries = min(config.groups, config.classes)
    self.query_embed = Queries(queries, width, rngs=rngs) if queries else None
    has_own_width = bool(queries) or config.query_width == width
    self.wordvec_proj = None if has_own_width else linear(config.query_width, width, **own)
    group = -(-config.classes // queries) if queries else 1
    shape = (queries, width, group) if queries else (width, 1)
    # PyTorch's Xavier counts all axes but the first two as receptive field.
    spread = nnx.initializers.normal(math.sqrt(2 / (group * (width + (queries or 1)))))
    self.duplicate_pooling = nnx.Param(layers.first(spread)(rngs.params(), shape, out))
    self.duplicate_pooling_bias = nnx.Param(layers.ZEROS(rngs.params(), (config.classes or 1,), out))

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "MLDecoder":
    """`config` has fields of `MLDecoderConfig`.

    Raises:
      ValueError: a field is of the wrong kind or value.
    """
    return cls(layers.read_config(MLDecoderConfig, config, "ML-Decoder"), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(key: str) -> str | None:
    """The attribute path of a key of timm's or the original's; None for the trunk's."""
    if key.startswith("body."):
      return None
    key = key.removeprefix("head.")
    below = key.removeprefix("decoder.")
    return below if below.startswith(_MOVED) else key

  def memory(self, features: jax.Array) -> jax.Array:
    """What queries attend to, `[b, t, d]`, of features `[b, t, c]` or `[b, i, j, c]`.

    Its mean over tokens is the image embedding of CLIP-Decoder (arXiv 2406.14830).
    """
    return jax.nn.relu(self.embed_standart(features.reshape(len(features), -1, features.shape[-1])))

  def decode(self, memory_btd: jax.Array, queries_kw: jax.Array | None = None, *,
             key: jax.Array | None = None) -> jax.Array:
    """Logits `[b, n]`, or `[b, k]` of the labels that are asked for; see `__call__`."""
    key = key if self.config.dropout else None  # drawing numbers that drop nothing takes longer than the attention
    states_bkd = self.decoder.layers[0](self._queries(queries_kw), memory_btd, key)
    letters = "dg" if self.query_embed is None else "kdg"
    logits_bkg = jnp.einsum(f"bkd,{letters}->bkg", states_bkd, self.duplicate_pooling[...],
                            preferred_element_type=jnp.float32)
    logits_bn = logits_bkg.reshape(len(states_bkd), -1)  # the last group may be larger than what is left for it
    return logits_bn[:, :self.config.classes or None] + self.duplicate_pooling_bias[...]

  def _queries(self, queries_kw: jax.Array | None) -> jax.Array:
    """`[k, d]`."""
    if (queries_kw is None) != (self.query_embed is not None):
      wanted = "needs queries, one vector for each label" if queries_kw is None else "takes no queries"
      raise ValueError(f"an ML-Decoder of {self.config.classes} classes {wanted} (0 is the zero-shot one, which does)")
    if queries_kw is None:
      return self.query_embed.weight[...]
    if queries_kw.ndim != 2 or queries_kw.shape[1] != self.config.query_width:
      raise ValueError(f"queries have shape {queries_kw.shape}, wanted [labels, {self.config.query_width}]: take the "
                       "vectors that the decoder was trained with, or another query_width")
    return jax.nn.relu(queries_kw if self.wordvec_proj is None else self.wordvec_proj(queries_kw))

  def __call__(self, features: jax.Array, queries_kw: jax.Array | None = None, *,
               key: jax.Array | None = None) -> jax.Array:
    """Logits `[b, n]`, or `[b, k]` of the labels that are asked for, float32.

    Args:
      features: of the trunk, `[b, t, c]` or `[b, i, j, c]`.
      queries_kw: of the zero-shot decoder alone, one vector for each label.
      key: of dropout; None is evaluation.

    Raises:
      ValueError: queries where there must be none, none where there must be, or of another width.
    """
    return self.decode(self.memory(features), queries_kw, key=key)


def structure(tensors: Mapping) -> dict:
  """The config of the decoder that a file's tensors make up; heads and dropout leave no trace and are the original's.

  Raises:
    ValueError: they make up no ML-Decoder.
  """
  shapes = {MLDecoder.canonical_name(key): tensor.shape for key, tensor in tensors.items()}
  try:
    width, inputs = shapes["embed_standart.weight"]
    found = {"inputs": inputs, "width": width, "feed_forward": shapes["decoder.layers.0.linear1.weight"][0]}
    if "query_embed.weight" not in shapes:
      return found | {"query_width": shapes.get("wordvec_proj.weight", (width, width))[1]}
    return found | {"classes": shapes["duplicate_pooling_bias"][0], "groups": shapes["query_embed.weight"][0]}
  except KeyError as error:
    other = " but another head, head.fc" if "fc.weight" in shapes else ""
    raise ValueError(f"it holds no ML-Decoder{other}: there is no {error.args[0]}") from error


def load(path: os.PathLike, *, dtype=jnp.float32) -> MLDecoder:
  """The head of a safetensors file or model folder, whatever its trunk, which `tresnet.load` reads.

  Raises:
    CheckpointError: the file is absent, damaged, pickled, or holds no ML-Decoder.
  """
  path = pathlib.Path(path).expanduser()
  own = path / "config.json"
  if own.is_file() and hub.read_json(own).get("model_type") == "ml_decoder":
    return hub.load(MLDecoder, path, dtype=dtype)
  tensors = hub.read_tensors(path)
  try:
    config = structure(tensors)
  except ValueError as error:
    raise hub.CheckpointError(f"{path}: {error}") from error
  return hub.fill(hub.abstract(MLDecoder, config, dtype=dtype), tensors, source=path)
