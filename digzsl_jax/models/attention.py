"""Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, eq. 1) with a float32 softmax.

`attention` shows its weights, `attend` does without them and so need not hold all of them at once: queries are
independent, so any part of them can be worked on by itself, with the same sums. `choose` says how many.

Shapes: b batch, l query, m key, h head, d width of a head, n query of one block.
"""

import jax
import jax.numpy as jnp

BLOCK = 512  # queries at once
LONG = 2**20  # queries times keys from which parts are quicker on a CPU (docs/precision.md)
LARGE = 2**28  # weights, a GiB in float32, above which an accelerator works in parts too
FLASH_WIDTH = 128  # of a head, the largest that cuDNN takes on every GPU that has its kernel


def softmax(logits: jax.Array) -> jax.Array:
  """Over the last axis, by one reciprocal a row.

  XLA turns the quotients in the gradient of `jax.nn.softmax` into products or not depending on what it
  partitions, and rounds accordingly; class tokens must not depend on the number of devices.
  """
  powers = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  return powers * (1 / powers.sum(-1, keepdims=True))


def attention(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array,
              bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """All at once.

  Args:
    q_blhd: queries.
    k_bmhd: keys.
    v_bmhd: values.
    bias: added to the logits, broadcastable to `[b, h, l, m]`; `-inf` masks.

  Returns:
    `(out_blhd, weights_bhlm)`; under `jit` unused weights cost nothing extra.
  """
  logits_bhlm = jnp.einsum("blhd,bmhd->bhlm", q_blhd, k_bmhd, preferred_element_type=jnp.float32)
  logits_bhlm *= q_blhd.shape[-1] ** -0.5
  if bias is not None:
    logits_bhlm += bias
  weights_bhlm = softmax(logits_bhlm)
  out_blhd = jnp.einsum("bhlm,bmhd->blhd", weights_bhlm.astype(v_bmhd.dtype), v_bmhd,
                        preferred_element_type=jnp.float32)
  return out_blhd.astype(v_bmhd.dtype), weights_bhlm


def by_queries(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """One block of queries after another; the way back computes a block's weights again."""
  block = jax.checkpoint(lambda q_bnhd: attention(q_bnhd, k_bmhd, v_bmhd)[0])
  b, queries, *hd = q_blhd.shape
  count = -(-queries // BLOCK)
  size = -(-queries // count)
  filled_blhd = jnp.pad(q_blhd, ((0, 0), (0, count * size - queries), (0, 0), (0, 0)))
  out = jax.lax.map(block, jnp.moveaxis(filled_blhd.reshape(b, count, size, *hd), 1, 0))
  return jnp.moveaxis(out, 0, 1).reshape(b, count * size, *hd)[:, :queries]


def by_heads(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """One head of one row after another, each by blocks of queries: a CPU's dots are quick without batch axes."""
  b, queries, h, d = q_blhd.shape
  rows = (jnp.moveaxis(x, 2, 1).reshape(b * h, 1, -1, 1, d) for x in (q_blhd, k_bmhd, v_bmhd))
  out = jax.lax.map(lambda row: by_queries(*row), tuple(rows))
  return jnp.moveaxis(out.reshape(b, h, queries, d), 1, 2)


def flash(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """cuDNN's fused kernel (Dao et al., arXiv 2205.14135), in 16 bits."""
  return jax.nn.dot_product_attention(q_blhd, k_bmhd, v_bmhd, implementation="cudnn")


def whole(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """`attention` without its weights."""
  return attention(q_blhd, k_bmhd, v_bmhd)[0]


def choose(platform: str, dtype, shape: tuple[int, int, int, int], keys: int):
  """The implementation for queries of `shape` `[b, l, h, d]`: what docs/precision.md measured where it could.

  Args:
    platform: "cpu", "gpu" or "tpu".
    dtype: of queries, keys and values.
    shape: of the queries.
    keys: how many there are.
  """
  b, queries, h, d = shape
  is_long = queries * keys >= LONG
  if platform == "cpu":
    return by_heads if is_long else whole
  if platform == "gpu" and is_long and jnp.dtype(dtype).itemsize == 2 and d % 8 == 0 and d <= FLASH_WIDTH:
    return flash
  return by_queries if b * h * queries * keys > LARGE else whole


def attend(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """`attention` without its weights, `[b, l, h, d]`, by the implementation that `choose` names."""
  chosen = choose(jax.default_backend(), q_blhd.dtype, q_blhd.shape, k_bmhd.shape[1])
  return chosen(q_blhd, k_bmhd, v_bmhd)
