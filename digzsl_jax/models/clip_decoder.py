"""CLIP-Decoder (arXiv 2406.14830): ML-Decoder's head on an image encoder, asked by text embeddings of label names.

Beside the logits of the labels it puts images and captions into one space, for the CLIP loss.

Shapes: b image, i j pixel, c colour, t token, e channel of the encoder, d width of the decoder, k label, w width of a
query, x width of a caption's embedding, p of the shared space.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import layers
from digzsl_jax.models.cdm import Preprocess
from digzsl_jax.models.clip import CLIPVisionModel
from digzsl_jax.models.ml_decoder import MLDecoder
from digzsl_jax.models.tresnet import TResNet


class Tokens(nnx.Module):
  """An image encoder without its pooling.

  Of CLIP's vision tower these are all positions after the last norm, the class position first; of a TResNet the
  positions of its last features, row by row.
  """

  def __init__(self, tower: CLIPVisionModel | TResNet, preprocess: Preprocess | None = None):
    """`preprocess` is that of CLIP's tower; TResNet has none."""
    self.tower, self.preprocess, self.width = tower, preprocess, tower.width

  def __call__(self, images_bijc: jax.Array, *, train: bool = False) -> jax.Array:
    """`[b, t, e]` of images in [-1, 1]; `train` says by which statistics a batch norm goes."""
    if self.preprocess is None:
      features = self.tower((images_bijc + 1) / 2, train=train)
      return features.reshape(len(features), -1, features.shape[-1])
    pooled_be, out = self.tower(self.preprocess(images_bijc))
    return jnp.concatenate([pooled_be[:, None], out["patches"]], axis=1)


class CLIPDecoder(nnx.Module):
  """Tokens of an image to the logits of labels; one `score(tokens, queries)` for any list of labels.

  The label space is an argument: with queries of seen, unseen or all labels the same weights answer for these.

  Attributes:
    encoder: makes the tokens; None where they come ready.
    temperature: t of the CLIP loss, whose logits are exp(t) times a cosine.
  """

  def __init__(self, encoder: Tokens | None, head: Mapping, captions: int, shared: int, temperature: float, *,
               dtype=jnp.float32, rngs: nnx.Rngs):
    """`head` has fields of `MLDecoderConfig`, `captions` is x, `shared` is p."""
    self.encoder = nnx.data(encoder)  # may be given later: large weights stay out of the compiled initialisation
    self.head = MLDecoder.from_json(head, dtype=dtype, rngs=rngs)
    normal = nnx.initializers.normal(1.0)
    self.image_projection = layers.parameter(normal, (self.head.config.width, shared), rngs=rngs)
    self.text_projection = layers.parameter(normal, (captions, shared), rngs=rngs)
    self.temperature = layers.parameter(nnx.initializers.constant(temperature), (), rngs=rngs)

  def tokens(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """`[b, t, e]` of uint8 images `[b, i, j, c]`; what has that form already stays as it is."""
    if images.ndim == 3:
      return images
    return self.encoder(images.astype(jnp.float32) / 127.5 - 1, train=train)

  def score(self, tokens_bte: jax.Array, queries_kw: jax.Array | None) -> jax.Array:
    """Logits `[b, k]`, float32, without dropout; no queries for a decoder of a closed list of labels."""
    return self.head(tokens_bte, queries_kw)

  def __call__(self, tokens_bte: jax.Array, queries_kw: jax.Array | None, captions_bx: jax.Array,
               key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What training compares: logits `[b, k]`, and images and captions in the shared space, `[b, p]`, of any norm.

    An image is there the mean of what its queries attend to.
    """
    memory_btd = self.head.memory(tokens_bte)
    images_bp = memory_btd.astype(jnp.float32).mean(1) @ self.image_projection[...]
    return self.head.decode(memory_btd, queries_kw, key=key), images_bp, captions_bx @ self.text_projection[...]


class FlatTokens(nnx.Module):
  """Images in [-1, 1] to their tokens in one row, `[b, t * e]`."""

  def __init__(self, encoder: Tokens):
    self.encoder = encoder

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    return self.encoder(images_bijc).astype(jnp.float32).reshape(len(images_bijc), -1)


class Scorer(nnx.Module):
  """Images in [-1, 1] to logits `[b, k]` of the labels whose queries it holds."""

  def __init__(self, decoder: CLIPDecoder, queries_kw: jax.Array | None):
    self.decoder = decoder
    self.queries = None if queries_kw is None else nnx.Variable(jnp.asarray(queries_kw))

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    queries_kw = None if self.queries is None else self.queries[...]
    return self.decoder.score(self.decoder.encoder(images_bijc), queries_kw)


def score_tokens(decoder: CLIPDecoder, queries_kw: np.ndarray | None, tokens_nte: np.ndarray,
                 batch: int = 64) -> Iterator[np.ndarray]:
  """Logits `[b, k]` of tokens that come ready, batch by batch; the last one is filled up for the compiled model."""
  graphdef, state = nnx.split(decoder)
  score = jax.jit(lambda state, tokens_bte: nnx.merge(graphdef, state).score(tokens_bte, queries_kw))
  batch = min(batch, len(tokens_nte))
  for start in range(0, len(tokens_nte), batch):
    tokens_bte = np.asarray(tokens_nte[start:start + batch], np.float32)
    missing = batch - len(tokens_bte)
    filled = np.concatenate([tokens_bte, np.repeat(tokens_bte[-1:], missing, axis=0)])
    yield np.asarray(score(state, filled))[:len(tokens_bte)]
