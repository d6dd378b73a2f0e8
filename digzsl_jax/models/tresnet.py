"""TResNet (arXiv 2003.13630) as ML-Decoder (arXiv 2111.12933) has it, without its classifier.

A residual network that begins by moving 4x4 pixels into channels, blurs before it halves a side, and weighs channels
by squeeze and excitation (arXiv 1709.01507). Attribute paths are the parameter names of timm's `TResNet`; files of the
original are read as well. There a layer of batch norm is an `InPlaceABN`, whose scale is `|weight| + 1e-5`.

"L" and "XL" here are ML-Decoder's (timm's `tresnet_v2_l`). Those of the TResNet and ASL repositories and timm's
`tresnet_l` and `tresnet_xl` are other networks by the same names: M's blocks, 1.2 and 1.3 times as wide.

Shapes: b batch, i j height and width in pixels or positions, r c row and column within a patch, k colour, d channel.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import hub, layers

EPSILON = 1e-5
PATCH = 4  # side of what becomes one position
STRIDE = 32  # pixels of the images to one position of the features
SMALLEST = 20  # pixels of a side that leave two positions to the last blur
STEM_SLOPE, SLOPE = 1e-2, 1e-3  # below zero, of leaky ReLU
KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

VARIANTS = {
    "M": dict(layers=(3, 4, 11, 3), bottleneck=(False, False, True, True), width=64),
    "L": dict(layers=(3, 4, 23, 3), bottleneck=(True,) * 4, width=64),
    "XL": dict(layers=(3, 8, 34, 5), bottleneck=(True,) * 4, width=64),
}
_ABN = re.compile(r"(conv\d|downsample\.\d)(?:\.0)?\.([01])\.(weight|bias|running_mean|running_var)$")  # the original's


@dataclasses.dataclass(frozen=True)
class TResNetConfig:
  """What the model needs of a `config.json`; the defaults are M.

  Attributes:
    layers: blocks of each of the four stages.
    bottleneck: whether they are bottlenecks, four times as wide at their ends.
    width: of the stem and the first stage; each further stage is twice as wide.
  """

  layers: tuple[int, ...] = VARIANTS["M"]["layers"]
  bottleneck: tuple[bool, ...] = VARIANTS["M"]["bottleneck"]
  width: int = VARIANTS["M"]["width"]

  def __post_init__(self):
    if len(self.layers) != 4 or len(self.bottleneck) != 4 or min(*self.layers, self.width) < 1:
      raise ValueError(f"TResNet config: layers {self.layers} and bottleneck {self.bottleneck} must have one entry for "
                       f"each of four stages, and they and width {self.width} be positive")


def space_to_depth(images_bijk: jax.Array) -> jax.Array:
  """Patches of 4x4 pixels as positions, row by row in the channels, the colours of a pixel side by side."""
  b, i, j, k = images_bijk.shape
  x_birjck = images_bijk.reshape(b, i // PATCH, PATCH, j // PATCH, PATCH, k)
  return x_birjck.swapaxes(2, 3).reshape(b, i // PATCH, j // PATCH, PATCH * PATCH * k)


def blur(x_bijd: jax.Array) -> jax.Array:
  """Every other position of `[1 2 1] / 4` along both axes, the border reflected (arXiv 1904.11486).

  By shifts: XLA:CPU is far slower at convolutions of one channel each.
  """
  for axis in 1, 2:
    pads = [(1, 1) if axis == other else (0, 0) for other in range(4)]
    padded, last = jnp.pad(x_bijd, pads, mode="reflect"), x_bijd.shape[axis]
    left, middle, right = (jax.lax.slice_in_dim(padded, start, start + last, 2, axis) for start in range(3))
    x_bijd = (left + right) * 0.25 + middle * 0.5
  return x_bijd


class AveragePool(nnx.Module):
  """Mean of 2x2 positions; of those that are there at the end of an odd side."""

  def __call__(self, x_bijd: jax.Array, *, train: bool = False) -> jax.Array:
    for axis in 1, 2:
      pads = [(0, x_bijd.shape[axis] % 2 if axis == other else 0) for other in range(4)]
      padded = jnp.pad(x_bijd, pads, mode="edge")  # the mean of twice the same is the same
      even, odd = (jax.lax.slice_in_dim(padded, start, None, 2, axis) for start in range(2))
      x_bijd = (even + odd) * 0.5
    return x_bijd


class ConvNormAct(nnx.Module):
  """Convolution without bias, batch norm, leaky ReLU with `slope` (None: none), blur where `stride` is 2."""

  def __init__(self, inputs: int, outputs: int, kernel: int, *, slope: float | None, stride: int = 1,
               weight_init=nnx.initializers.ones, dtype, rngs: nnx.Rngs):
    self.slope, self.stride = slope, stride
    self.conv = layers.conv(inputs, outputs, kernel, bias=False, kernel_init=KAIMING, dtype=dtype, rngs=rngs)
    self.bn = layers.BatchNorm(outputs, EPSILON, weight_init=weight_init, dtype=dtype, rngs=rngs)

  def __call__(self, x_bijd: jax.Array, *, train: bool = False) -> jax.Array:
    is_pointwise = self.conv.kernel_size == (1, 1)
    x_bijd = layers.pointwise(self.conv, x_bijd) if is_pointwise else self.conv(x_bijd)
    x_bijd = self.bn(x_bijd, train=train)
    if self.slope is not None:
      x_bijd = jnp.where(x_bijd > 0, x_bijd, self.slope * x_bijd)
    return blur(x_bijd) if self.stride == 2 else x_bijd


class SqueezeExcite(nnx.Module):
  """A factor between 0 and 1 for each channel, from the mean over all positions."""

  def __init__(self, width: int, reduced: int, *, dtype, rngs: nnx.Rngs):
    own = dict(kernel_init=KAIMING, dtype=dtype, rngs=rngs)
    self.fc1 = layers.conv(width, reduced, 1, **own)
    self.fc2 = layers.conv(reduced, width, 1, **own)

  def __call__(self, x_bijd: jax.Array) -> jax.Array:
    mean_b11d = x_bijd.mean((1, 2), keepdims=True, dtype=jnp.float32)
    factors_b11d = layers.pointwise(self.fc2, jax.nn.relu(layers.pointwise(self.fc1, mean_b11d)))
    return x_bijd * jax.nn.sigmoid(factors_b11d).astype(x_bijd.dtype)


class Block(nnx.Module):
  """What both kinds share: the convolutions beside a shortcut, ReLU of the sum.

  Attributes:
    expansion: how many times wider than `planes` it comes out.
  """

  expansion: int

  def __init__(self, inputs: int, planes: int, stride: int, *, excite: bool, dtype, rngs: nnx.Rngs):
    outputs, own = planes * self.expansion, dict(dtype=dtype, rngs=rngs)
    self._build(inputs, planes, stride, excite, own)
    shortcut = [AveragePool()] if stride == 2 else []
    if shortcut or inputs != outputs:
      shortcut.append(ConvNormAct(inputs, outputs, 1, slope=None, **own))
    self.downsample = nnx.List(shortcut)

  def __call__(self, x_bijd: jax.Array, *, train: bool = False) -> jax.Array:
    shortcut_bijd = x_bijd
    for step in self.downsample:
      shortcut_bijd = step(shortcut_bijd, train=train)
    return jax.nn.relu(self._branch(x_bijd, train) + shortcut_bijd)


class BasicBlock(Block):
  """Two 3x3 convolutions, then squeeze and excitation."""

  expansion = 1

  def _build(self, inputs: int, planes: int, stride: int, excite: bool, own: dict):
    self.conv1 = ConvNormAct(inputs, planes, 3, slope=SLOPE, stride=stride, **own)
    self.conv2 = ConvNormAct(planes, planes, 3, slope=None, weight_init=nnx.initializers.zeros, **own)
    self.se = SqueezeExcite(planes, max(planes // 4, 64), **own) if excite else None

  def _branch(self, x_bijd: jax.Array, train: bool) -> jax.Array:
    x_bijd = self.conv2(self.conv1(x_bijd, train=train), train=train)
    return x_bijd if self.se is None else self.se(x_bijd)


class Bottleneck(Block):
  """1x1, 3x3 and 1x1 convolutions; squeeze and excitation is before the last, on the narrow side."""

  expansion = 4

  def _build(self, inputs: int, planes: int, stride: int, excite: bool, own: dict):
    outputs = planes * self.expansion
    self.conv1 = ConvNormAct(inputs, planes, 1, slope=SLOPE, **own)
    self.conv2 = ConvNormAct(planes, planes, 3, slope=SLOPE, stride=stride, **own)
    self.se = SqueezeExcite(planes, max(outputs // 8, 64), **own) if excite else None
    self.conv3 = ConvNormAct(planes, outputs, 1, slope=None, weight_init=nnx.initializers.zeros, **own)

  def _branch(self, x_bijd: jax.Array, train: bool) -> jax.Array:
    x_bijd = self.conv2(self.conv1(x_bijd, train=train), train=train)
    return self.conv3(x_bijd if self.se is None else self.se(x_bijd), train=train)


class Body(nnx.Module):
  """Stem and stages, one level down as checkpoints have them.

  Attributes:
    width: channels that come out.
  """

  def __init__(self, config: TResNetConfig, *, dtype, rngs: nnx.Rngs):
    own = dict(dtype=dtype, rngs=rngs)
    self.conv1 = ConvNormAct(3 * PATCH * PATCH, config.width, 3, slope=STEM_SLOPE, **own)
    width = config.width
    for stage, (blocks, is_bottleneck) in enumerate(zip(config.layers, config.bottleneck)):
      kind, planes, stage_blocks = Bottleneck if is_bottleneck else BasicBlock, config.width * 2**stage, []
      for number in range(blocks):
        stride = 2 if stage and not number else 1
        stage_blocks.append(kind(width, planes, stride, excite=stage < 3, **own))
        width = planes * kind.expansion
      setattr(self, f"layer{stage + 1}", nnx.List(stage_blocks))
    self.width = width

  def __call__(self, images_bijk: jax.Array, *, train: bool) -> jax.Array:
    x_bijd = self.conv1(space_to_depth(images_bijk), train=train)
    for stage in self.layer1, self.layer2, self.layer3, self.layer4:
      for block in stage:
        x_bijd = block(x_bijd, train=train)
    return x_bijd


class TResNet(nnx.Module):
  """Images to features, before any pooling.

  Attributes:
    width: of the features, 2048 in M, L and XL.
  """

  def __init__(self, config: TResNetConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.body = Body(config, dtype=dtype, rngs=rngs)
    self.width = self.body.width

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "TResNet":
    """`config` has fields of `TResNetConfig`, as the entries of `VARIANTS` do.

    Raises:
      ValueError: a field is of the wrong kind or number.
    """
    return cls(layers.read_config(TResNetConfig, config, "TResNet"), dtype=dtype, rngs=rngs)

  @staticmethod
  def canonical_name(key: str) -> str | None:
    """The attribute path of a key of timm's or the original's; None for the head's, counters, and blurs' weights."""
    if key.startswith("head.") or key.endswith((".num_batches_tracked", ".filt")):
      return None
    return _ABN.sub(lambda found: f"{found[1]}.{('conv', 'bn')[int(found[2])]}.{found[3]}", key)

  def __call__(self, images_bijk: jax.Array, *, train: bool = False) -> jax.Array:
    """Features `[b, i / 32, j / 32, d]`, sides rounded up.

    Args:
      images_bijk: in [0, 1], which is all the normalisation there is; sides are multiples of 4.
      train: by the statistics of the batch, which move the running ones (`layers.BatchNorm`).

    Raises:
      ValueError: sides that are too small or no multiples of 4, or `train` with a single position in all.
    """
    i, j = images_bijk.shape[1:3]
    if i % PATCH or j % PATCH or min(i, j) < SMALLEST:
      raise ValueError(f"images of {i}x{j} pixels: TResNet takes sides of at least {SMALLEST} that are multiples of "
                       f"{PATCH}; resize them")
    return self.body(images_bijk, train=train)


def structure(keys: Mapping) -> dict:
  """The config of the network that a file's tensors make up.

  Raises:
    ValueError: they make up no TResNet.
  """
  names = {TResNet.canonical_name(key): key for key in keys}
  places = [re.match(r"body\.layer([1-4])\.(\d+)\.", name) for name in names if name]
  blocks = {(int(place[1]), int(place[2])) for place in places if place}
  counts = tuple(sum(stage == number for stage, _ in blocks) for number in range(1, 5))
  if "body.conv1.conv.weight" not in names or not all(counts):
    raise ValueError("it holds no TResNet: no body.conv1, or no blocks in one of body.layer1 to body.layer4")
  bottleneck = tuple(f"body.layer{number}.0.conv3.conv.weight" in names for number in range(1, 5))
  return {"layers": counts, "bottleneck": bottleneck, "width": keys[names["body.conv1.conv.weight"]].shape[0]}


def _published(tensors: Mapping, path: pathlib.Path) -> dict:
  """The entry of `VARIANTS` that `tensors` are, or an error that says what they are."""
  try:
    found = structure(tensors)
  except ValueError as error:
    raise hub.CheckpointError(f"{path}: {error}") from error
  if found not in VARIANTS.values():
    raise hub.CheckpointError(
        f"{path}: a TResNet of {found} is none of ML-Decoder's {', '.join(VARIANTS)}. L and XL of the TResNet and ASL "
        "repositories (timm's tresnet_l, tresnet_xl) are other networks: take ML-Decoder's (timm's tresnet_v2_l), or "
        "put this file as model.safetensors beside a config.json with these fields and model_type tresnet")
  return found


def _has_inplace_abn(keys: Iterable[str]) -> bool:
  """Whether a file is the original's with its own layers: PyTorch's batch norm would have counted batches."""
  return (any(_ABN.search(key) for key in keys)
          and not any(key.endswith(".num_batches_tracked") for key in keys))


def load(path: os.PathLike, *, dtype=jnp.float32) -> TResNet:
  """The trunk of a safetensors file or model folder, whatever its head, which `ml_decoder.load` reads.

  Without a config.json whose model_type is "tresnet" it must be one of `VARIANTS`.

  Raises:
    CheckpointError: the file is absent, damaged, pickled, or holds another network.
  """
  path = pathlib.Path(path).expanduser()
  tensors = hub.read_tensors(path)
  own = path / "config.json"
  if own.is_file() and hub.read_json(own).get("model_type") == "tresnet":
    model = hub.load(TResNet, path, dtype=dtype)
  else:
    model = hub.fill(hub.abstract(TResNet, _published(tensors, path), dtype=dtype), tensors, source=path)
  if _has_inplace_abn(tensors):
    for _, module in nnx.iter_modules(model):
      if isinstance(module, layers.BatchNorm):
        module.weight[...] = jnp.abs(module.weight[...]) + EPSILON
  return model
