"""The Inception-v3 (arXiv 1512.00567) that the Frechet inception distance is defined by.

The network of TensorFlow's archive inception-2015-12-05, whose mean activations after the last block are the features
of FID (arXiv 1706.08500) and KID (arXiv 1801.01401). It is not torchvision's: average pooling leaves the padding out
of its means, and the last block pools by maximum. Attribute paths are the parameter names of the file
`pt_inception-2015-12-05-6726825d.pth`, the port to PyTorch that pytorch-fid and torch-fidelity read; the classifier in
it, of 1008 classes, is left out.

Shapes: b batch, i j height and width, x y the same resized, c colour, d width.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import hub, layers
from digzsl_jax.resize import weights as bicubic_weights

SIDE = 299
WIDTH = 2048
EPSILON = 1e-3
WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")


def bilinear(images_bijc: jax.Array) -> jax.Array:
  """As pytorch-fid: images in [-1, 1] between their next pixels, whatever their size, so that shrinking aliases."""
  return _resize(images_bijc, _between_neighbours)


def bicubic_antialias(images_bijc: jax.Array) -> jax.Array:
  """As clean-fid (arXiv 2104.11222): Pillow's bicubic resize without rounding colours, then `x / 128 - 1` of
  [0, 255]."""
  return _resize(images_bijc, lambda size: bicubic_weights(size, SIDE)) * (127.5 / 128) - 0.5 / 128


def _resize(images_bijc: jax.Array, weights: Callable[[int], np.ndarray]) -> jax.Array:
  rows, columns = map(weights, images_bijc.shape[1:3])
  return jnp.einsum("xi,bijc,yj->bxyc", rows, images_bijc, columns, precision="highest")


def _between_neighbours(size: int) -> np.ndarray:
  """`[SIDE, size]`: what each of `size` pixels counts for each of the new ones.

  Places are computed in float32, as PyTorch does, which moves colours by up to 1e-4 at 640 pixels.
  """
  shrink = np.float64(np.float32(size) / SIDE)
  centres = ((np.arange(SIDE) + 0.5) * shrink - 0.5).astype(np.float32)  # rounded once: a fused multiply-add
  weights = np.maximum(1 - np.abs(centres[:, None] - np.arange(size, dtype=np.float32)), 0)
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


RESIZES = {"bilinear": bilinear, "bicubic_antialias": bicubic_antialias}


def average_pool(x_bijd: jax.Array) -> jax.Array:
  """Mean of the 3x3 pixels around each, of those that are there."""
  sums_bijd, counts_1ij1 = (_around(x, jnp.add, 0) for x in (x_bijd, jnp.ones((1, *x_bijd.shape[1:3], 1))))
  return sums_bijd / counts_1ij1


def max_pool(x_bijd: jax.Array) -> jax.Array:
  """Maximum of the 3x3 pixels around each."""
  return _around(x_bijd, jnp.maximum, -jnp.inf)


def halving_max_pool(x_bijd: jax.Array) -> jax.Array:
  """Maximum of 3x3 pixels at every other place, without padding."""
  return _threes(x_bijd, jnp.maximum, 2)


def _around(x_bijd: jax.Array, combine: Callable, outside: float) -> jax.Array:
  return _threes(jnp.pad(x_bijd, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=outside), combine, 1)


def _threes(x_bijd: jax.Array, combine: Callable, stride: int) -> jax.Array:
  """Three neighbours combined along one axis, then the other: XLA:CPU's `reduce_window` takes two to four times as
  long."""
  for axis in 1, 2:
    last = x_bijd.shape[axis] - 2
    first, second, third = (jax.lax.slice_in_dim(x_bijd, start, start + last, stride, axis) for start in range(3))
    x_bijd = combine(combine(first, second), third)
  return x_bijd


class Conv(NamedTuple):
  """A `BasicConv2d`; of stride 1 it keeps height and width, of stride 2 it has no padding."""

  name: str
  outputs: int
  kernel: int | tuple[int, int] = 1
  stride: int = 1


class Beside(NamedTuple):
  """Branches over the same input, their outputs one after another in d."""

  branches: tuple[tuple, ...]


def _block_a(pooled: int) -> Beside:
  return Beside(((Conv("branch1x1", 64),),
                 (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
                 (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
                 (average_pool, Conv("branch_pool", pooled))))


def _block_c(width: int) -> Beside:
  wide, high = (1, 7), (7, 1)
  return Beside(((Conv("branch1x1", 192),),
                 (Conv("branch7x7_1", width), Conv("branch7x7_2", width, wide), Conv("branch7x7_3", 192, high)),
                 (Conv("branch7x7dbl_1", width), Conv("branch7x7dbl_2", width, high),
                  Conv("branch7x7dbl_3", width, wide), Conv("branch7x7dbl_4", width, high),
                  Conv("branch7x7dbl_5", 192, wide)),
                 (average_pool, Conv("branch_pool", 192))))


def _block_e(pool: Callable) -> Beside:
  def split(name):
    return Beside(((Conv(f"{name}a", 384, (1, 3)),), (Conv(f"{name}b", 384, (3, 1)),)))
  return Beside(((Conv("branch1x1", 320),),
                 (Conv("branch3x3_1", 384), split("branch3x3_2")),
                 (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")),
                 (pool, Conv("branch_pool", 192))))


BLOCK_B = Beside(((Conv("branch3x3", 384, 3, 2),),
                  (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2)),
                  (halving_max_pool,)))
BLOCK_D = Beside(((Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 2)),
                  (Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
                   Conv("branch7x7x3_4", 192, 3, 2)),
                  (halving_max_pool,)))
BLOCKS = {  # after the first convolutions, in their order
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64), "Mixed_6a": BLOCK_B,
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": BLOCK_D, "Mixed_7b": _block_e(average_pool), "Mixed_7c": _block_e(max_pool)}


class BasicConv2d(nnx.Module):
  """Convolution without bias, batch norm, ReLU."""

  def __init__(self, inputs: int, outputs: int, kernel=1, stride: int = 1, *, dtype, rngs: nnx.Rngs):
    padding = None if stride == 1 else 0
    self.conv = layers.conv(inputs, outputs, kernel, stride=stride, padding=padding, bias=False, dtype=dtype, rngs=rngs)
    self.bn = layers.BatchNorm(outputs, EPSILON, dtype=dtype, rngs=rngs)

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    is_pointwise = self.conv.kernel_size == (1, 1)
    return jax.nn.relu(self.bn(layers.pointwise(self.conv, x_bijd) if is_pointwise else self.conv(x_bijd)))


def inner(x_bijd: jax.Array) -> jax.Array:
  """Without the outermost pixels: what a convolution without padding leaves of one with it. XLA:CPU computes them all
  in a third of the time that it takes over these alone."""
  return x_bijd[:, 1:-1, 1:-1]


class Mixed(nnx.Module):
  """A block: a `Beside` whose convolutions are attributes by their names."""

  def __init__(self, inputs: int, plan: Beside, *, dtype, rngs: nnx.Rngs):
    self.plan = plan
    self.width = self._build(inputs, (plan,), dict(dtype=dtype, rngs=rngs))

  def _build(self, inputs: int, steps: tuple, options: dict) -> int:
    """Makes the convolutions of `steps` and returns the width that comes out."""
    for step in steps:
      if isinstance(step, Beside):
        inputs = sum(self._build(inputs, branch, options) for branch in step.branches)
      elif isinstance(step, Conv):
        setattr(self, step.name, BasicConv2d(inputs, *step[1:], **options))
        inputs = step.outputs
    return inputs

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    return self._run(x_bijd, (self.plan,))

  def _run(self, x_bijd: jax.Array, steps: tuple) -> jax.Array:
    for step in steps:
      if isinstance(step, Beside):
        x_bijd = jnp.concatenate([self._run(x_bijd, branch) for branch in step.branches], axis=-1)
      else:
        x_bijd = getattr(self, step.name)(x_bijd) if isinstance(step, Conv) else step(x_bijd)
    return x_bijd


class InceptionV3(nnx.Module):
  """Images to the features of FID."""

  def __init__(self, resize: str = "bilinear", *, dtype=jnp.float32, rngs: nnx.Rngs):
    """`resize`: a key of `RESIZES`."""
    if resize not in RESIZES:
      raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(RESIZES)}")
    self.resize = resize
    own = dict(dtype=dtype, rngs=rngs)
    self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2, **own)
    self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, **own)
    self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, **own)
    self.Conv2d_3b_1x1 = BasicConv2d(64, 80, **own)
    self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, **own)
    width = 192
    for name, plan in BLOCKS.items():
      setattr(self, name, block := Mixed(width, plan, **own))
      width = block.width

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "InceptionV3":
    return cls(**config, dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(key: str) -> str | None:
    return None if key.startswith("fc.") or key.endswith(".num_batches_tracked") else key

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    """Features `[b, 2048]`, float32, of images in [-1, 1] of any size."""
    x_bijd = RESIZES[self.resize](images_bijc)
    x_bijd = self.Conv2d_2b_3x3(inner(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_bijd))))
    x_bijd = inner(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_max_pool(x_bijd))))
    x_bijd = halving_max_pool(x_bijd)
    for name in BLOCKS:
      x_bijd = getattr(self, name)(x_bijd)
    return x_bijd.astype(jnp.float32).mean((1, 2))


def locate(path: os.PathLike) -> pathlib.Path:
  """The file, "~" expanded.

  Raises:
    CheckpointError: there is none, or it is not safetensors.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix != ".safetensors" or not path.is_file():
    raise hub.CheckpointError(f"no safetensors file {path} with the weights of FID's Inception: download {WEIGHTS} "
                              "and convert it once with `python -m digzsl_jax.convert FILE.pth FILE.safetensors` "
                              "(needs the extra `oracle`)")
  return path


def load(path: os.PathLike, *, resize: str = "bilinear", dtype=jnp.float32) -> InceptionV3:
  """The network of a safetensors file that `python -m digzsl_jax.convert` made.

  Raises:
    CheckpointError: the file is absent, damaged, or holds another network.
    ValueError: `resize` is no key of `RESIZES`.
  """
  path = locate(path)
  model = hub.abstract(InceptionV3, {"resize": resize}, dtype=dtype)
  return hub.fill(model, hub.read_tensors(path), source=path)
