"""Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, eq. 1) with a float32 softmax.

`attention` shows its weights, `attend` does without them and so need not hold all of them at once: queries are
independent, so any part of them can be worked on by itself, with the same sums. `choose` says how many.

Shapes: b batch, l query, m key, h head, d width of a head, e values and sums, n query of one block.
"""

import functools

import jax
import jax.numpy as jnp

from digzsl_jax.models import platforms
from digzsl_jax.models.products import dot

BLOCK = 512  # queries at once
LONG = 512  # queries and keys, from which on parts are quicker on a CPU (docs/precision.md)
SUMS = 8  # columns beside the values: one for the sum of the weights, and none that breaks a vector of floats
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
  q_bhld, v_bhmd = (jnp.moveaxis(x, 2, 1) for x in (q_blhd, v_bmhd))
  q_bhld, k_bhdm, v_bhmd = _laid_out(q_bhld, k_bmhd.transpose(0, 2, 3, 1), v_bhmd)
  logits_bhlm = jnp.einsum("bhld,bhdm->bhlm", q_bhld, k_bhdm, preferred_element_type=jnp.float32)
  logits_bhlm *= q_blhd.shape[-1] ** -0.5
  if bias is not None:
    logits_bhlm += bias
  weights_bhlm = softmax(logits_bhlm)
  [out_bhld] = _laid_out(jnp.einsum("bhlm,bhmd->bhld", weights_bhlm.astype(v_bmhd.dtype), v_bhmd,
                                    preferred_element_type=jnp.float32))
  return jnp.moveaxis(out_bhld, 1, 2).astype(v_bmhd.dtype), weights_bhlm


def _laid_out(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The same numbers, in memory as their axes say.

  Products of float32 take XLA:CPU twice the time on other orders, which it would make of transposed ones by itself.
  """
  is_slow = platforms.platform() == "cpu" and arrays[0].dtype == jnp.float32
  return jax.lax.optimization_barrier(arrays) if is_slow else arrays


def _scan_blocks(block, carry, queries, most: int):
  """`block(carry, part)` for one part of the leading axis after another, of `most` or fewer; zeros fill the last."""
  length = len(jax.tree.leaves(queries)[0])
  count = -(-length // most)
  size = -(-length // count)

  def parts(x):
    return jnp.pad(x, ((0, count * size - length), *[(0, 0)] * (x.ndim - 1))).reshape(count, size, *x.shape[1:])

  carry, out = jax.lax.scan(block, carry, jax.tree.map(parts, queries))
  return carry, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:length], out)


def _in_blocks(block, queries: jax.Array, most: int):
  """`block(part)` of one part after another."""
  return _scan_blocks(lambda _, part: (None, block(part)), None, queries, most)[1]


def by_queries(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """One block of queries after another, small enough that its weights of all rows and heads are not many."""
  b, _, h, _ = q_blhd.shape
  most = max(1, min(BLOCK, LARGE // (b * h * k_bmhd.shape[1])))
  block = lambda q_nbhd: jnp.moveaxis(whole(jnp.moveaxis(q_nbhd, 0, 1), k_bmhd, v_bmhd), 1, 0)
  # The way back computes a part's weights again.
  return jnp.moveaxis(_in_blocks(jax.checkpoint(block), jnp.moveaxis(q_blhd, 1, 0), most), 0, 1)


def by_heads(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """One head of one row after another, each by blocks of queries, as products of plain matrices.

  XLA:CPU is several times slower at products with batch axes, be they of size one.
  """
  b, queries, h, _ = q_blhd.shape
  rows = (jnp.moveaxis(x, 2, 1).reshape(b * h, -1, x.shape[-1]) for x in (q_blhd, k_bmhd, v_bmhd))
  out_hld = jax.lax.map(lambda qkv: head(*qkv), tuple(rows))
  return jnp.moveaxis(out_hld.reshape(b, h, queries, -1), 1, 2)


@jax.custom_vjp
def head(q_ld: jax.Array, k_md: jax.Array, v_md: jax.Array) -> jax.Array:
  """One head, by blocks of queries; the way back (Dao et al., arXiv 2205.14135, algorithm 4) by the same blocks."""
  return _head(q_ld, k_md, v_md)[0]


def _head(q_ld: jax.Array, k_md: jax.Array, v_md: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The output and, of every query, the logarithm of the sum of its powers, `[l, 1]`."""
  d, low = q_ld.shape[-1], v_md.dtype
  keys_dm = k_md.T  # as the product wants them
  # The sum of a query's powers is one more column of its output: so they are read once.
  v_me = jnp.concatenate([v_md, jnp.zeros((len(v_md), SUMS), low).at[:, 0].set(1)], 1)

  def block(q_nd):
    logits_nm = dot(q_nd, keys_dm)
    largest_n1 = logits_nm.max(-1, keepdims=True)
    sums_ne = dot(jnp.exp((logits_nm - largest_n1) * d**-0.5).astype(low), v_me)
    total_n1 = sums_ne[:, d:d + 1]
    return (sums_ne[:, :d] / total_n1).astype(low), largest_n1 * d**-0.5 + jnp.log(total_n1)

  return _in_blocks(block, q_ld, BLOCK)


def _head_forward(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  out_ld, log_sums_l1 = _head(*qkv)
  return out_ld, (*qkv, out_ld, log_sums_l1)


def _head_backward(saved: tuple[jax.Array, ...], grad_ld: jax.Array) -> tuple[jax.Array, ...]:
  q_ld, k_md, v_md, out_ld, log_sums_l1 = saved
  d, low = q_ld.shape[-1], k_md.dtype
  shares_l1 = (grad_ld.astype(jnp.float32) * out_ld.astype(jnp.float32)).sum(-1, keepdims=True)
  keys_dm, values_dm = k_md.T, v_md.T

  def block(sums, part):
    q_nd, grad_nd, log_sums_n1, shares_n1 = part
    weights_nm = jnp.exp(dot(q_nd, keys_dm) * d**-0.5 - log_sums_n1)
    grad_nm = (weights_nm * (dot(grad_nd, values_dm) - shares_n1) * d**-0.5).astype(low)
    # Sums over queries are put out with the short axis first, which takes XLA:CPU half the time.
    new = dot(q_nd.T, grad_nm), dot(grad_nd.T, weights_nm.astype(low))
    return jax.tree.map(jnp.add, sums, new), dot(grad_nm, k_md).astype(q_nd.dtype)

  zeros = jnp.zeros((d, len(k_md)))
  (k_dm, v_dm), q_ld = _scan_blocks(block, (zeros, zeros), (q_ld, grad_ld, log_sums_l1, shares_l1), BLOCK)
  return q_ld, k_dm.T.astype(low), v_dm.T.astype(low)


head.defvjp(_head_forward, _head_backward)


def with_mean(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array,
              bias_bm: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`attention` and the mean over heads of its weights, `(out_blhd, mean_blm)`, one head after another.

  On a CPU it is one head of one row after another, as products of plain matrices (see `by_heads`).

  Args:
    bias_bm: added to the logits of every query and head; `-inf` masks.
  """
  h, d = q_blhd.shape[2:]
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def one(q_ld, k_md, v_md, bias_m):
    weights_lm = softmax(einsum("...ld,...md->...lm", q_ld, k_md) * d**-0.5 + bias_m)
    return weights_lm, einsum("...lm,...md->...ld", weights_lm.astype(v_md.dtype), v_md).astype(v_md.dtype)

  # Both sums and outputs start from what the queries give: XLA would write constant zeros for all layers of a model
  # before it computes the first one, and memory would grow with their number.
  def zeros(q_ld, bias_m):
    return 0 * q_ld[..., :1].astype(jnp.float32) + jnp.zeros(bias_m.shape[-1])

  def heads(q_hld, k_hmd, v_hmd, bias_m):
    def add(carry, head):
      place, *qkv = head
      sum_lm, out_hld = carry
      weights_lm, out_ld = one(*qkv, bias_m)
      return (sum_lm + weights_lm, out_hld.at[place].set(out_ld)), None

    (sum_lm, out_hld), _ = jax.lax.scan(add, (zeros(q_hld[0], bias_m), q_hld), (jnp.arange(h), q_hld, k_hmd, v_hmd))
    return sum_lm / h, out_hld

  def one_row(row, carry):
    return jax.tree.map(lambda kept, new: kept.at[row].set(new), carry, heads(q[row], k[row], v[row], bias_bm[row]))

  if platforms.platform() == "cpu":
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q_blhd, k_bmhd, v_bmhd))
    mean_blm, out_bhld = jax.lax.fori_loop(0, len(q), one_row, (zeros(q[:, 0], bias_bm), q))
    return jnp.moveaxis(out_bhld, 1, 2), mean_blm
  q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q_blhd, k_bmhd, v_bmhd))
  mean_blm, out_hbld = heads(q, k, v, bias_bm[:, None])
  return jnp.moveaxis(out_hbld, 0, 2), mean_blm


def masked(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, bias_bm: jax.Array) -> jax.Array:
  """The first of what `with_mean` gives, where a gradient is wanted: the way back computes a head's weights again."""
  d, einsum = q_blhd.shape[-1], functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  @jax.checkpoint
  def one(q_ld, k_md, v_md, bias_m):
    weights_lm = softmax(einsum("...ld,...md->...lm", q_ld, k_md) * d**-0.5 + bias_m)
    return einsum("...lm,...md->...ld", weights_lm.astype(v_md.dtype), v_md).astype(v_md.dtype)

  def heads(row):
    *qkv, bias_m = row  # `[h, l, d]` each
    return jax.lax.map(lambda head: one(*head, bias_m), tuple(qkv))

  if platforms.platform() == "cpu":
    rows = (*(jnp.moveaxis(x, 2, 1) for x in (q_blhd, k_bmhd, v_bmhd)), bias_bm)
    return jnp.moveaxis(jax.lax.map(heads, rows), 1, 2)
  return jnp.moveaxis(heads((*(jnp.moveaxis(x, 2, 0) for x in (q_blhd, k_bmhd, v_bmhd)), bias_bm[:, None])), 0, 2)


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
  is_long = min(queries, keys) >= LONG
  if platform == "cpu":
    return by_heads if is_long else whole
  if platform == "gpu" and is_long and jnp.dtype(dtype).itemsize == 2 and d % 8 == 0 and d <= FLASH_WIDTH:
    return flash
  return by_queries if b * h * queries * keys > LARGE else whole


def attend(q_blhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
  """`attention` without its weights, `[b, l, h, d]`, by the implementation that `choose` names."""
  chosen = choose(platforms.platform(), q_blhd.dtype, q_blhd.shape, k_bmhd.shape[1])
  return chosen(q_blhd, k_bmhd, v_bmhd)
