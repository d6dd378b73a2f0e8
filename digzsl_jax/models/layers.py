"""Layers that every model shares, each equal to its PyTorch namesake.

Attribute paths of the models are the reference checkpoint's parameter names; only the last word
differs (`weight` is `kernel`, `scale` or `embedding` here), which `hub.py` translates.

Every model takes a `dtype`, and `types` says what it means:

  "float32"   everything in float32, as PyTorch by default
  "bfloat16"  weights, products and what passes between layers in bfloat16: half the memory
  "mixed"     weights and products in bfloat16, what passes between layers in float32

In each of them dot products are summed, softmax is taken and norms find their statistics in float32; so do the
VAE's last layers everything. A `jnp` type means everything in that type.

Shapes: b batch, l m positions, h heads, d width of one head or of the model, i j height and width, x y inputs
and outputs of a product, n everything else.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax import fsdp
from digzsl_jax.models import platforms
from digzsl_jax.models.attention import attend
from digzsl_jax.models.convolution import convolve
from digzsl_jax.models.products import dot, product

LECUN = nnx.initializers.lecun_normal()  # Flax's own first kernels
DTYPES = ("float32", "bfloat16", "mixed")
PART = 1024  # positions at once on a CPU
WIDE = 128  # channels from which layers have ways of their own on a CPU; narrower ones were not measured


def types(dtype) -> tuple[jnp.dtype, jnp.dtype]:
  """Of the weights and inputs of a product, and of what it puts out."""
  if dtype == "mixed":
    return jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
  return jnp.dtype(dtype), jnp.dtype(dtype)


def first(initializer):
  """Makes a layer's first weights: `initializer`'s, or where the key is None (`hub.abstract`) no more than shape
  and type. Tracing real initialisers by `nnx.eval_shape` would take a second for a large UNet."""
  def init(key, shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype) if key is None else initializer(key, shape, dtype)
  return init


def parameter(initializer, shape: tuple[int, ...], *, rngs: nnx.Rngs) -> nnx.Param:
  """A parameter that belongs to no layer, float32."""
  return nnx.Param(first(initializer)(rngs.params(), shape))


def initialised(make: Callable[[], nnx.Module]) -> nnx.Module:
  """What `make` builds, initialised in one compiled call: eager initialisation is slow."""
  graphdef = nnx.graphdef(nnx.eval_shape(make))
  return nnx.merge(graphdef, jax.jit(lambda: nnx.state(make()))())


ZEROS, ONES = first(nnx.initializers.zeros), first(nnx.initializers.ones)


class Linear(nnx.Linear):
  """`nnx.Linear` over two axes: XLA:CPU computes the weight's gradient several times slower over more."""

  def __call__(self, inputs: jax.Array) -> jax.Array:
    out_ny = product(inputs.reshape(-1, self.in_features), self.kernel[...])
    if self.bias is not None:
      out_ny += self.bias[...]
    return out_ny.astype(self.dtype).reshape(*inputs.shape[:-1], self.out_features)


def linear(inputs: int, outputs: int, *, bias: bool = True, kernel_init=LECUN, bias_init=nnx.initializers.zeros, dtype,
           rngs: nnx.Rngs) -> Linear:
  weights, out = types(dtype)
  return Linear(inputs, outputs, use_bias=bias, dtype=out, param_dtype=weights, kernel_init=first(kernel_init),
                bias_init=first(bias_init), rngs=rngs)


def in_parts(function: Callable[[jax.Array], jax.Array], x_bld: jax.Array) -> jax.Array:
  """`function`, which makes many numbers of every position by itself, of some positions after another.

  On a CPU what lies between then stays in the cache, and is computed again on the way back: kept, it would be memory
  that XLA takes for the whole program. Elsewhere, and where models are small, all at once.
  """
  count, d = x_bld.shape[0] * x_bld.shape[1], x_bld.shape[2]
  if platforms.platform() != "cpu" or d < WIDE or count <= PART or count % PART:
    return function(x_bld)
  return jax.lax.map(jax.checkpoint(function), x_bld.reshape(-1, PART, d)).reshape(*x_bld.shape[:2], -1)


class Conv(nnx.Conv):
  """`nnx.Conv` whose output has a type of its own."""

  def __init__(self, *args, out, **options):
    super().__init__(*args, **options)
    self.out = out

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    return super().__call__(x_bijd).astype(self.out)


def conv(inputs: int, outputs: int, kernel: int | tuple[int, int], *, stride: int = 1, padding=None, bias: bool = True,
         kernel_init=LECUN, dtype, rngs: nnx.Rngs) -> Conv:
  """Convolution over `[b, i, j, channel]`, square for one number; padding defaults to `kernel // 2` on every side."""
  kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
  if padding is None:
    padding = tuple((size // 2, size // 2) for size in kernel)
  pads = ((padding, padding),) * 2 if isinstance(padding, int) else tuple(padding)
  weights, out = types(dtype)
  return Conv(inputs, outputs, kernel, strides=stride, padding=pads, use_bias=bias,
              conv_general_dilated=convolve, dtype=weights, param_dtype=weights, out=out,
              kernel_init=first(kernel_init), bias_init=ZEROS, rngs=rngs)


def pointwise(conv: Conv, x_bijd: jax.Array) -> jax.Array:
  """A 1x1 convolution of stride 1 as a product: as a convolution it takes XLA:CPU twice as long."""
  out_nd = product(x_bijd.reshape(-1, x_bijd.shape[-1]), conv.kernel[...][0, 0])
  if conv.bias is not None:
    out_nd += conv.bias[...]
  return out_nd.astype(conv.out).reshape(*x_bijd.shape[:-1], -1)


class GroupNorm(nnx.GroupNorm):
  """`nnx.GroupNorm` (arXiv 1803.08494) without splitting the channel axis before it reduces, which XLA:CPU
  runs two to four times slower."""

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    x_bld = x_bijd.reshape(x_bijd.shape[0], -1, x_bijd.shape[-1]).astype(jnp.float32)
    normalise = _normalise_by_products if platforms.platform() == "cpu" and x_bld.shape[-1] >= WIDE else _normalise
    out_bld = normalise(x_bld, self.num_groups, self.epsilon, self.scale[...]) + self.bias[...]
    return out_bld.reshape(x_bijd.shape).astype(self.dtype)


def _group_mean(x_bld: jax.Array, groups: int) -> jax.Array:
  """Mean over positions and over the channels of each group, repeated for every channel: `[b, 1, d]`."""
  b, _, d = x_bld.shape
  means_bg = x_bld.mean(1).reshape(b, groups, -1).mean(-1)
  return jnp.repeat(means_bg, d // groups, axis=-1)[:, None]


def _statistics(x_bld: jax.Array, groups: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
  """What is left of `x_bld` without its mean, and one over its standard deviation, `[b, 1, d]`."""
  centred_bld = x_bld - _group_mean(x_bld, groups)
  # Two passes: the one-pass variance loses digits that PyTorch keeps and breaks parity at 1e-5.
  return centred_bld, jax.lax.rsqrt(_group_mean(centred_bld**2, groups) + epsilon)


def _normalise(x_bld: jax.Array, groups: int, epsilon: float, scale_d: jax.Array) -> jax.Array:
  centred_bld, deviation_b1d = _statistics(x_bld, groups, epsilon)
  return centred_bld * (deviation_b1d * scale_d)


def _normalise_forward(x_bld, groups, epsilon, scale_d):
  return _normalise(x_bld, groups, epsilon, scale_d), (x_bld, scale_d)


def _normalise_backward(groups, epsilon, saved, grad_bld):
  """JAX's own, with sums over positions as products: XLA:CPU would make what is summed on one core, once a sum."""
  x_bld, scale_d = saved
  b, positions, d = x_bld.shape
  rows_bn = jnp.repeat(jnp.eye(b), positions, axis=1)
  mean = lambda sums_bd: jnp.repeat(sums_bd.reshape(b, groups, -1).mean(-1) / positions, d // groups, axis=-1)[:, None]
  centred_bld, deviation_b1d = _statistics(x_bld, groups, epsilon)
  normed_bld, scaled_bld = centred_bld * deviation_b1d, grad_bld * scale_d
  grads_bd, products_bd = (dot(rows_bn, x_bld.reshape(-1, d)) for x_bld in (scaled_bld, grad_bld * normed_bld))
  back_bld = scaled_bld - mean(grads_bd) - normed_bld * mean(products_bd * scale_d)
  return back_bld * deviation_b1d, products_bd.sum(0)


_normalise_by_products = jax.custom_vjp(_normalise, nondiff_argnums=(1, 2))
_normalise_by_products.defvjp(_normalise_forward, _normalise_backward)


def group_norm(channels: int, groups: int, epsilon: float, *, dtype, rngs: nnx.Rngs) -> GroupNorm:
  out = types(dtype)[1]
  return GroupNorm(channels, groups, epsilon=epsilon, dtype=out, param_dtype=out, scale_init=ONES, bias_init=ZEROS,
                   rngs=rngs)


def layer_norm(width: int, epsilon: float, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Layer norm (arXiv 1607.06450) with a two-pass variance, for the reason that `GroupNorm` gives."""
  out = types(dtype)[1]
  return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=out, param_dtype=out, scale_init=ONES,
                       bias_init=ZEROS, rngs=rngs)


class BatchNorm(nnx.Module):
  """Batch norm (arXiv 1502.03167) in float32, with PyTorch's names, momentum 0.1 and unbiased running variance.

  In training a batch is the whole one, however it is sharded, and the model gets new running statistics: what is
  compiled or differentiated must return them, `nnx.state(model, nnx.BatchStat)`.
  """

  def __init__(self, channels: int, epsilon: float, *, weight_init=nnx.initializers.ones, dtype, rngs: nnx.Rngs):
    zeros, ones = ZEROS(rngs.params(), (channels,)), ONES(rngs.params(), (channels,))
    self.epsilon, self.dtype = epsilon, types(dtype)[1]
    self.weight, self.bias = parameter(weight_init, (channels,), rngs=rngs), nnx.Param(zeros)
    self.running_mean, self.running_var = nnx.BatchStat(zeros), nnx.BatchStat(ones)

  def __call__(self, x_bijd: jax.Array, *, train: bool = False) -> jax.Array:
    """By the running statistics, or where `train` by those of the batch.

    Raises:
      ValueError: `train`, and the batch has one value for each channel.
    """
    mean_d, var_d = self._update(x_bijd) if train else (self.running_mean[...], self.running_var[...])
    scale_d = self.weight[...] * jax.lax.rsqrt(var_d + self.epsilon)
    return (x_bijd * scale_d + (self.bias[...] - mean_d * scale_d)).astype(self.dtype)

  def _update(self, x_bijd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of the batch, which move the running ones."""
    x_nd = x_bijd.astype(jnp.float32).reshape(-1, x_bijd.shape[-1])
    if len(x_nd) == 1:
      raise ValueError("a batch with one value for each channel has no variance: train on larger images or batches")
    mean_d = x_nd.mean(0)
    var_d = ((x_nd - mean_d)**2).mean(0)
    unbiased_d = var_d * (len(x_nd) / (len(x_nd) - 1))
    # New variables: those that came with the model may belong to an outer trace, as inside of `jax.grad`.
    self.running_mean = nnx.BatchStat(0.9 * self.running_mean[...] + 0.1 * mean_d)
    self.running_var = nnx.BatchStat(0.9 * self.running_var[...] + 0.1 * unbiased_d)
    return mean_d, var_d


def embedding(rows: int, width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Embed:
  """A table of vectors."""
  out = types(dtype)[1]
  return nnx.Embed(rows, width, embedding_init=first(nnx.initializers.normal(0.02)), dtype=out, param_dtype=out,
                   rngs=rngs)


def activation(name: str):
  """The function that a transformers config calls `hidden_act`."""
  known = {"gelu": lambda x: jax.nn.gelu(x, approximate=False),
           "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
           "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}
  if name not in known:
    raise ValueError(f"hidden_act {name!r} is not supported; use one of {sorted(known)}")
  return known[name]


def split_heads(x_bld: jax.Array, heads: int) -> jax.Array:
  """`[b, l, heads * d]` to `[b, l, heads, d]`."""
  return x_bld.reshape(*x_bld.shape[:-1], heads, x_bld.shape[-1] // heads)


def known_fields(config_type, config: Mapping) -> dict:
  """The fields of the dataclass that `config` sets; a null there means the default, as in transformers."""
  names = [field.name for field in dataclasses.fields(config_type)]
  return {name: config[name] for name in names if config.get(name) is not None}


def read_config(config_type, config: Mapping, what: str):
  """A config dataclass from the fields of a parsed JSON object that it knows, lists as tuples.

  Raises:
    ValueError: a field is not of its default's type; `what` says whose config it is.
  """
  def fits(value, default):
    if isinstance(default, tuple):
      return isinstance(value, tuple) and len(value) > 0 and all(fits(v, default[0]) for v in value)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))

  fields = {}
  for field in dataclasses.fields(config_type):
    value = config.get(field.name, field.default)
    fields[field.name] = tuple(value) if isinstance(value, list) else value
    if not fits(fields[field.name], field.default):
      raise ValueError(f"{what} config: {field.name}={value!r} is not supported; "
                       f"expected the kind of {field.default!r}")
  return config_type(**fields)


def call(function, modules, *arrays, remat: bool):
  """`function(modules, *arrays)`, its activations computed again on the way back if `remat`.

  The parameters are arguments of the checkpointed function, not constants it closes over: JAX
  caches its trace by function, and a constant would go stale there.
  """
  if not remat:
    return function(modules, *arrays)
  graphdef, state = nnx.split(modules)
  checkpoint = _checkpoint if platforms.platform() == "cpu" else jax.checkpoint
  again = checkpoint(lambda state, *arrays: function(nnx.merge(graphdef, fsdp.when(arrays[0], state)), *arrays))
  return again(state, *arrays)


def _checkpoint(function):
  """`jax.checkpoint` of `function(state, *arrays)` for XLA:CPU, which would compute all layers again at once, and so
  keep what checkpoints are to save, did the inputs not depend on the gradient that comes back."""
  @jax.custom_vjp
  def again(state, *arrays):
    return function(state, *arrays)

  def backward(saved, grads):
    state, *arrays = saved
    nothing = 0 * jax.tree.leaves(grads)[0].ravel()[0]
    arrays = [x + nothing.astype(x.dtype) for x in arrays]
    return jax.vjp(function, state, *arrays)[1](grads)

  again.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
  return again


class Attention(nnx.Module):
  """Multi-head attention with the parameter names of diffusers."""

  def __init__(self, width: int, context: int, heads: int, *, bias: bool, dtype, rngs: nnx.Rngs):
    self.heads = heads
    own = dict(bias=bias, dtype=types(dtype)[0], rngs=rngs)  # their products meet in another one
    self.to_q = linear(width, width, **own)
    self.to_k = linear(context, width, **own)
    self.to_v = linear(context, width, **own)
    self.to_out = nnx.List([linear(width, width, dtype=dtype, rngs=rngs)])

  def __call__(self, x_bld: jax.Array, context_bmd: jax.Array) -> jax.Array:
    q_blhd, k_bmhd, v_bmhd = (split_heads(projected, self.heads) for projected in
                              (self.to_q(x_bld), self.to_k(context_bmd), self.to_v(context_bmd)))
    out_blhd = attend(q_blhd, k_bmhd, v_bmhd)
    return self.to_out[0](out_blhd.reshape(*out_blhd.shape[:2], -1))


class ResnetBlock2D(nnx.Module):
  """Two convolutions beside a shortcut, with a time embedding added between them where there is one."""

  def __init__(self, inputs: int, outputs: int, groups: int, epsilon: float, *, time: int | None = None,
               scale: float = 1.0, dtype, rngs: nnx.Rngs):
    self.scale = scale
    self.norm1 = group_norm(inputs, groups, epsilon, dtype=dtype, rngs=rngs)
    self.conv1 = conv(inputs, outputs, 3, dtype=dtype, rngs=rngs)
    self.time_emb_proj = None if time is None else linear(time, outputs, dtype=dtype, rngs=rngs)
    self.norm2 = group_norm(outputs, groups, epsilon, dtype=dtype, rngs=rngs)
    self.conv2 = conv(outputs, outputs, 3, dtype=dtype, rngs=rngs)
    self.conv_shortcut = None if inputs == outputs else conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x_bijd: jax.Array, time_bd: jax.Array | None = None) -> jax.Array:
    hidden_bijd = self.conv1(jax.nn.silu(self.norm1(x_bijd)))
    if time_bd is not None:
      hidden_bijd += self.time_emb_proj(jax.nn.silu(time_bd))[:, None, None]
    hidden_bijd = self.conv2(jax.nn.silu(self.norm2(hidden_bijd)))
    if self.conv_shortcut is not None:
      x_bijd = self.conv_shortcut(x_bijd)
    return (x_bijd + hidden_bijd) / self.scale


class Downsample2D(nnx.Module):
  """Convolution of stride 2."""

  def __init__(self, channels: int, padding, *, dtype, rngs: nnx.Rngs):
    self.conv = conv(channels, channels, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    return self.conv(x_bijd)


def double(x_bijd: jax.Array) -> jax.Array:
  """Every pixel twice in both directions."""
  b, i, j, d = x_bijd.shape
  return jnp.broadcast_to(x_bijd[:, :, None, :, None], (b, i, 2, j, 2, d)).reshape(b, 2 * i, 2 * j, d)


class Upsample2D(nnx.Module):
  """`double`, then a convolution."""

  def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
    self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

  def __call__(self, x_bijd: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """`size`: height and width wanted, each twice the input's or one less."""
    x_bijd = double(x_bijd)
    if size is not None:  # nearest-neighbour resizing from n to 2 n - 1 is doubling without the last
      x_bijd = x_bijd[:, :size[0], :size[1]]
    return self.conv(x_bijd)
