"""Convolutions of images, each shape in the way that is quickest where it runs (docs/precision.md has the table).

Accelerators have what `jax.lax.conv_general_dilated` asks for. XLA:CPU is slow at wide 3x3 kernels over small images
in float32, and at all of them in 16 bits; there the same sums are made by products of matrices.

Shapes: b batch, i j height and width, c input and o output channels, n positions (b, i, j), u v place in a kernel or
tile, p taps of a patch (u, v, c).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax.models import platforms
from digzsl_jax.models.products import dot, dot_back

WIDE = 256  # channels on both sides from which products gain; 128 do not
BAND = 1024  # positions worked on at a time: what lies between products stays in the cache, and memory small
PADDING = ((1, 1), (1, 1))  # that leaves the size of an image as it is


def choose(platform: str, dtype, positions: int, size: tuple[int, int], kernel: tuple[int, int, int, int],
           is_unit: bool) -> str:
  """The way of a convolution.

  Args:
    platform: "cpu", "gpu" or "tpu".
    dtype: of the kernel.
    positions: of all images that are put out.
    size: height and width of an image that comes in.
    kernel: its shape, `[u, v, c, o]`.
    is_unit: whether stride and padding leave the size of an image as it is.

  Returns:
    "plain", "patches", "shifts" or "winograd".
  """
  taps, low = kernel[:2], jnp.dtype(dtype).itemsize < 4
  if platform != "cpu" or taps not in ((1, 1), (3, 3)) or min(kernel[2:]) < WIDE:
    return "plain"
  if taps == (1, 1):
    return "patches" if is_unit else "plain"
  if positions <= kernel[3] // 2:
    return "patches"
  if not is_unit:
    return "patches" if low and positions <= 4 * BAND else "plain"
  if low:
    return "shifts"
  return "plain" if any(side % 2 for side in size) else "winograd"


def convolve(x_bijc: jax.Array, kernel_uvco: jax.Array, strides, padding, **options) -> jax.Array:
  """`jax.lax.conv_general_dilated`, for `nnx.Conv`; sums are float32, and rounded once to the kernel's type."""
  (b, i, j, _), taps, strides = x_bijc.shape, kernel_uvco.shape[:2], tuple(strides)
  padding = tuple(map(tuple, padding))
  out = [(size + sum(pads) - tap) // step + 1 for size, pads, tap, step in zip((i, j), padding, taps, strides)]
  is_unit = strides == (1, 1) and padding == tuple((tap // 2, tap // 2) for tap in taps)
  way = choose(platforms.platform(), kernel_uvco.dtype, b * math.prod(out), (i, j), kernel_uvco.shape, is_unit)
  if way == "plain":
    return plain(x_bijc, kernel_uvco, strides, padding, **options)
  if way == "patches":
    return by_patches(x_bijc, kernel_uvco, strides, padding)
  return {"shifts": by_shifts, "winograd": winograd}[way](x_bijc, kernel_uvco)


def plain(x_bijc: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
  """XLA's own, with a gradient that is fast on a CPU inside loops and conditions too.

  There XLA:CPU leaves the kernel of JAX's own gradient in a layout (outputs before inputs) that it has no
  fast code for; outside it would turn it round. So here it is turned round by hand.
  """
  own = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, **options)
  if any(stride != 1 for stride in strides):
    return own(x_bijc, kernel, padding=padding)

  @jax.custom_vjp
  def unit(x_bijc, kernel):
    return own(x_bijc, kernel, padding=padding)

  def backward(saved, grad_bijc):
    x_bijc, kernel = saved
    pads = [(size - 1 - low, size - 1 - high) for size, (low, high) in zip(kernel.shape, padding)]
    to_kernel = jax.linear_transpose(lambda kernel: own(x_bijc, kernel, padding=padding), kernel)
    return own(grad_bijc, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), padding=pads), to_kernel(grad_bijc)[0]

  unit.defvjp(lambda x_bijc, kernel: (unit(x_bijc, kernel), (x_bijc, kernel)), backward)
  return unit(x_bijc, kernel)


def by_patches(x_bijc: jax.Array, kernel_uvco: jax.Array, strides: tuple[int, int], padding) -> jax.Array:
  """One product with all shifted images side by side: for images smaller than the kernel, and kernels of one tap."""
  taps = kernel_uvco.shape[:2]

  def patches(x_bijc):
    x_bijc = jnp.pad(x_bijc, ((0, 0), *padding, (0, 0)))
    rows, columns = (range(size - tap + 1) for size, tap in zip(x_bijc.shape[1:3], taps))
    shifted = [x_bijc[:, u:u + len(rows):strides[0], v:v + len(columns):strides[1]] for u, v in np.ndindex(taps)]
    return jnp.concatenate(shifted, -1)

  def moved(x_bijc):
    if x_bijc.dtype.itemsize > 2:
      return patches(x_bijc)
    # As integers: XLA:CPU would make float32 of bfloat16 before it moves it, and bfloat16 again afterwards.
    return jax.lax.bitcast_convert_type(patches(jax.lax.bitcast_convert_type(x_bijc, jnp.uint16)), x_bijc.dtype)

  @jax.custom_vjp
  def way(x_bijc, kernel_uvco):
    patches_bijp = moved(x_bijc)
    out_no = dot(patches_bijp.reshape(-1, patches_bijp.shape[-1]), kernel_uvco.reshape(-1, kernel_uvco.shape[-1]))
    return out_no.astype(kernel_uvco.dtype).reshape(*patches_bijp.shape[:3], -1)

  def backward(saved, grad_bijo):
    """Through the same product, so that the kernel is not turned round: it is the larger side here."""
    x_bijc, kernel_uvco = saved
    o = kernel_uvco.shape[-1]
    grad_no, kernel_po, patches_bijp = grad_bijo.reshape(-1, o), kernel_uvco.reshape(-1, o), moved(x_bijc)
    grad_bijp = dot_back(grad_no, kernel_po).reshape(patches_bijp.shape)
    [to_image] = jax.linear_transpose(patches, x_bijc.astype(jnp.float32))(grad_bijp)
    to_kernel = dot(patches_bijp.reshape(len(grad_no), -1).T, grad_no).reshape(kernel_uvco.shape)
    return to_image.astype(x_bijc.dtype), to_kernel.astype(kernel_uvco.dtype)

  way.defvjp(lambda x, kernel: (way(x, kernel), (x, kernel)), backward)
  return way(x_bijc, kernel_uvco)


def _in_bands(band: Callable[[jax.Array], jax.Array], x_bijc: jax.Array, outputs: int, dtype) -> jax.Array:
  """`band` of some rows with a frame around them, `[b, rows + 2, j + 2, c]`, one part of the image after another."""
  b, i, j, _ = x_bijc.shape
  rows = next((rows for rows in range(2, i, 2) if i % rows == 0 and 2 * b * rows * j > BAND), i)
  if rows == i:
    return band(jnp.pad(x_bijc, ((0, 0), *PADDING, (0, 0))))

  def one(number, out_bijo):
    lines = number * rows - 1 + jnp.arange(rows + 2)
    inside = ((lines >= 0) & (lines < i))[:, None, None]
    part = jnp.where(inside, jnp.take(x_bijc, lines, axis=1, mode="clip"), 0)
    part = band(jnp.pad(part, ((0, 0), (0, 0), PADDING[1], (0, 0))))
    return jax.lax.dynamic_update_slice_in_dim(out_bijo, part, number * rows, 1)

  # Zeros that come from the image: XLA would write constant ones for all layers before it computes the first.
  zeros = jnp.broadcast_to(0 * x_bijc[..., :1].astype(dtype), (b, i, j, outputs))
  return jax.lax.fori_loop(0, i // rows, one, zeros)


def _with_gradient(way: Callable) -> Callable:
  """`way(x, kernel, outputs, dot)` with itself as the way back to the image, and XLA's to the kernel.

  Back, `dot` sums over the kernel's outputs where they lie: turning a wide kernel round takes as long as a product.
  """
  @jax.custom_vjp
  def own(x_bijc, kernel_uvco):
    return way(x_bijc, kernel_uvco, kernel_uvco.shape[3], dot)

  def backward(saved, grad_bijo):
    x_bijc, kernel_uvco = saved
    whole = lambda kernel: jax.lax.conv_general_dilated(x_bijc, kernel, (1, 1), PADDING,
                                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    to_image = way(grad_bijo, kernel_uvco[::-1, ::-1], kernel_uvco.shape[2], dot_back)
    return to_image, jax.linear_transpose(whole, kernel_uvco)(grad_bijo)[0]

  own.defvjp(lambda x, kernel: (own(x, kernel), (x, kernel)), backward)
  return functools.wraps(way)(own)


@_with_gradient
def by_shifts(x_bijc: jax.Array, kernel_uvco: jax.Array, outputs: int, dot: Callable) -> jax.Array:
  """Nine products of shifted images."""
  def band(part_bijc):
    b, i, j, c = (size - 2 * (axis in (1, 2)) for axis, size in enumerate(part_bijc.shape))
    out_no = sum(dot(part_bijc[:, u:u + i, v:v + j].reshape(-1, c), kernel_uvco[u, v])
                 for u in range(3) for v in range(3))
    return out_no.astype(kernel_uvco.dtype).reshape(b, i, j, -1)

  return _in_bands(band, x_bijc, outputs, kernel_uvco.dtype)


@_with_gradient
def winograd(x_bijc: jax.Array, kernel_uvco: jax.Array, outputs: int, dot: Callable) -> jax.Array:
  """F(2x2, 3x3) of Lavin and Gray (arXiv 1509.09308): 16 products a tile of four positions instead of 36."""
  # Something of the image: XLA would make the tiles of all layers' kernels before it computes the first layer.
  kernel_uvco += 0 * x_bijc[0, 0, 0, 0]
  kernels_uv = [_kernel_tile(row) for row in _kernel_tile(kernel_uvco)]

  def band(part_bijc):
    b, i, j, c = (size - 2 * (axis in (1, 2)) for axis, size in enumerate(part_bijc.shape))
    tiles_uv = [_image_tile(row, 2) for row in _image_tile(part_bijc, 1)]
    products_uv = [[dot(tile.reshape(-1, c), kernel) for tile, kernel in zip(tiles_v, kernels_v)]
                   for tiles_v, kernels_v in zip(tiles_uv, kernels_uv)]
    columns_vu = [_sums(products_v) for products_v in products_uv]
    pairs = [jnp.stack(_sums([columns[v] for columns in columns_vu])) for v in range(2)]  # by v, then `[u, n, o]`
    out_vubijo = jnp.stack(pairs).reshape(2, 2, b, i // 2, j // 2, -1)
    return out_vubijo.transpose(2, 3, 1, 4, 0, 5).reshape(b, i, j, -1)

  return _in_bands(band, x_bijc, outputs, jnp.float32)


def _kernel_tile(kernel: jax.Array) -> list[jax.Array]:
  """G of section 4.1 along the leading axis of three taps."""
  even, odd = (kernel[0] + kernel[2]) / 2, kernel[1] / 2
  return [kernel[0], even + odd, even - odd, kernel[2]]


def _image_tile(x: jax.Array, axis: int) -> list[jax.Array]:
  """B^T along an axis that has two entries more than there are outputs."""
  size = x.shape[axis] - 2
  a, b, c, d = (jax.lax.slice_in_dim(x, at, at + size - 1, 2, axis) for at in range(4))
  return [a - c, b + c, c - b, b - d]


def _sums(products: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """A^T."""
  a, b, c, d = products
  return a + b + c, b - c - d
