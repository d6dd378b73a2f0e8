"""Floating-point operations of the models, by arithmetic on their configs: two for each multiplication with addition.

Convolutions, linear layers and the two products of attention count; norms, activations and resizing do not, nor does
what a compiler computes again. Everything is for one image or text unless an argument says otherwise.

`docs/benchmarks_speed.md` says how a benchmark adds them up. Tests hold them to PyTorch's `FlopCounterMode`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from digzsl_jax.models import inception
from digzsl_jax.models.clip import TextConfig, VisionConfig
from digzsl_jax.models.ml_decoder import MLDecoderConfig
from digzsl_jax.models.unet import DOWN, UP, UNetConfig
from digzsl_jax.models.vae import VAEConfig
from digzsl_jax.models.vit import ViTConfig


class Work(NamedTuple):
  """Operations by kind.

  Attributes:
    convolution: of more than one position.
    linear: and of one.
    attention: logits and weighted values.
  """

  convolution: int = 0
  linear: int = 0
  attention: int = 0

  @property
  def forward(self) -> int:
    return sum(self)

  @property
  def backward(self) -> int:
    """To the inputs alone, the weights being frozen: as much again, and twice for attention, whose two products have
    two inputs each."""
    return self.forward + self.attention

  def __add__(self, other: "Work") -> "Work":
    return Work(*(mine + its for mine, its in zip(self, other)))

  def __sub__(self, other: "Work") -> "Work":
    return Work(*(mine - its for mine, its in zip(self, other)))

  def __mul__(self, times: int) -> "Work":
    return Work(*(times * mine for mine in self))


def total(parts: Iterable[Work]) -> Work:
  return sum(parts, Work())


def convolution(positions: int, inputs: int, outputs: int, kernel: int = 3) -> Work:
  """`positions` of the output; `kernel` is one side of a square."""
  return Work(convolution=2 * positions * kernel**2 * inputs * outputs)


def linear(positions: int, inputs: int, outputs: int) -> Work:
  return Work(linear=2 * positions * inputs * outputs)


def attention(queries: int, keys: int, width: int) -> Work:
  """Of all heads, which are `width` together."""
  return Work(attention=4 * queries * keys * width)


def _resnet(positions: int, inputs: int, outputs: int) -> Work:
  """Without the time embedding."""
  works = [convolution(positions, inputs, outputs), convolution(positions, outputs, outputs)]
  return total(works + ([convolution(positions, inputs, outputs, 1)] if inputs != outputs else []))


class _Layers(list):
  """`(kind, work)` of a UNet's layers in their order.

  Kinds are "time" (what time embeddings pass through), "text" (keys and values of the text), "cross" (where both meet)
  and "pixels", the rest.
  """

  def add(self, kind: str, *works: Work) -> None:
    self.append((kind, total(works)))

  def resnet(self, positions: int, inputs: int, outputs: int, time: int) -> None:
    self.add("time", linear(1, time, outputs))
    self.add("pixels", _resnet(positions, inputs, outputs))

  def transformer(self, positions: int, width: int, config: UNetConfig, length: int) -> None:
    project = linear(positions, width, width)
    outer = project if config.use_linear_projection else convolution(positions, width, width, 1)
    self.add("text", linear(length, config.cross_attention_dim, 2 * width))
    self.add("pixels", outer, project * 4, attention(positions, positions, width), project)  # the last: queries
    self.add("cross", attention(positions, length, width))
    self.add("pixels", project, linear(positions, width, 8 * width), linear(positions, 4 * width, width), outer)


def _unet_layers(config: UNetConfig, height: int, width: int, length: int) -> _Layers:
  layers, widths, count = _Layers(), config.block_out_channels, config.layers_per_block
  time, last = 4 * widths[0], len(widths) - 1
  sizes = [(height, width)]
  for _ in widths[1:]:
    sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
  positions = [rows * columns for rows, columns in sizes]
  layers.add("time", linear(1, widths[0], time), linear(1, time, time))
  layers.add("pixels", convolution(positions[0], config.in_channels, widths[0]))
  skips, inputs = [widths[0]], widths[0]

  def layer(level: int, inputs: int, attends: bool) -> None:
    layers.resnet(positions[level], inputs, widths[level], time)
    if attends:
      layers.transformer(positions[level], widths[level], config, length)

  for level, kind in enumerate(config.down_block_types):
    for n in range(count):
      layer(level, widths[level] if n else inputs, DOWN[kind])
      skips.append(widths[level])
    if level < last:
      layers.add("pixels", convolution(positions[level + 1], widths[level], widths[level]))
      skips.append(widths[level])
    inputs = widths[level]
  layer(last, inputs, True)
  layer(last, inputs, False)
  for level, kind in zip(range(last, -1, -1), config.up_block_types):
    for _ in range(count + 1):
      layer(level, inputs + skips.pop(), UP[kind])
      inputs = widths[level]
    if level:
      layers.add("pixels", convolution(positions[level - 1], inputs, inputs))
  layers.add("pixels", convolution(positions[0], inputs, config.out_channels))
  return layers


def unet(config: UNetConfig, height: int, width: int, length: int) -> Work:
  """One call on latents of `height` times `width` with a text of `length` tokens."""
  return total(work for _, work in _unet_layers(config, height, width, length))


def unet_backward(config: UNetConfig, height: int, width: int, length: int, *, latents: bool) -> int:
  """From the output to the text, and where `latents` to these too.

  Without them there is no gradient in what comes before the first meeting with the text, nor in its queries.
  """
  layers = _unet_layers(config, height, width, length)
  first = 0 if latents else next(n for n, (kind, _) in enumerate(layers) if kind == "cross")
  carries = [work.backward for n, (kind, work) in enumerate(layers) if kind == "text" or kind != "time" and n >= first]
  return sum(carries) - (0 if latents else layers[first][1].forward // 2)


def vae_decoder(config: VAEConfig, height: int, width: int) -> Work:
  """From latents of `height` times `width`."""
  widths, positions, z = config.block_out_channels[::-1], height * width, config.latent_channels
  works = [convolution(positions, z, z, 1)] if config.use_post_quant_conv else []
  works += [convolution(positions, z, widths[0]), _vae_middle(config, positions)]
  for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths)):
    works += [_resnet(positions, outputs if n else inputs, outputs) for n in range(config.layers_per_block + 1)]
    if level < len(widths) - 1:
      positions *= 4
      works.append(convolution(positions, outputs, outputs))
  return total([*works, convolution(positions, widths[-1], config.out_channels)])


def vae_encoder(config: VAEConfig, height: int, width: int) -> Work:
  """From images of `height` times `width`."""
  widths, positions, z = config.block_out_channels, height * width, config.latent_channels
  works = [convolution(positions, config.in_channels, widths[0])]
  for level, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths)):
    works += [_resnet(positions, outputs if n else inputs, outputs) for n in range(config.layers_per_block)]
    if level < len(widths) - 1:
      positions //= 4
      works.append(convolution(positions, outputs, outputs))
  works += [_vae_middle(config, positions), convolution(positions, widths[-1], 2 * z)]
  return total(works + ([convolution(positions, 2 * z, 2 * z, 1)] if config.use_quant_conv else []))


def _vae_middle(config: VAEConfig, positions: int) -> Work:
  width = config.block_out_channels[-1]
  own = linear(positions, width, width) * 4 + attention(positions, positions, width)
  return _resnet(positions, width, width) * 2 + own * config.mid_block_add_attention


def _encoder(positions: int, config: TextConfig | VisionConfig | ViTConfig, layers: int | None = None) -> Work:
  """The first `layers` of a transformer, by default all."""
  width, inner = config.hidden_size, config.intermediate_size
  layer = linear(positions, width, width) * 4 + attention(positions, positions, width)
  return (layer + linear(positions, width, inner) * 2) * (config.num_hidden_layers if layers is None else layers)


def text(config: TextConfig, length: int) -> Work:
  """The text tower; causal attention counts whole, as it is computed."""
  return _encoder(length, config)


def vision(config: VisionConfig | ViTConfig, side: int, projection: int = 0) -> Work:
  """A vision tower on images of `side` pixels, and its projection to a shared space."""
  patches = (side // config.patch_size)**2
  embed = convolution(patches, config.num_channels, config.hidden_size, config.patch_size)
  return embed + _encoder(patches + 1, config) + linear(1, config.hidden_size, projection)


def tagclip_first(config: VisionConfig, rows: int, columns: int, projection: int, classes: int) -> Work:
  """Scores and refinement of `rows` times `columns` patches.

  In the last layer queries and keys give weights for the affinity alone, and values go on by themselves. The affinity
  is applied twice.
  """
  patches, width, inner = rows * columns, config.hidden_size, config.intermediate_size
  before = _encoder(patches + 1, config, config.num_hidden_layers - 1)
  embed = convolution(patches, config.num_channels, width, config.patch_size)
  last = linear(patches + 1, width, width) * 4 + linear(patches + 1, width, inner) * 2
  weights = Work(attention=attention(patches + 1, patches + 1, width).attention // 2)
  scores = linear(patches, width, projection) + linear(patches, projection, classes)
  spread = linear(patches, patches, classes) * 2
  return total([embed, before, last, weights, scores, spread])


def tagclip_second(config: VisionConfig, projection: int, classes: int) -> Work:
  """A crop of the model's own size; of the last layer the class position alone goes on."""
  width, inner, side = config.hidden_size, config.intermediate_size, config.image_size
  positions = (side // config.patch_size)**2 + 1
  whole = vision(config, side)
  spared = linear(positions - 1, width, width) * 2 + linear(positions - 1, width, inner) * 2
  spared += attention(positions - 1, positions, width)
  return whole - spared + linear(1, width, projection) + linear(1, projection, classes)


def head(kind: str, width: int, hidden: int, outputs: int) -> Work:
  """A head of the category discrimination model on one row of features."""
  return linear(1, outputs if kind == "residual" else width, hidden) + linear(1, hidden, outputs)


def classifier(width: int, hidden: int, classes: int) -> Work:
  """The zero-shot classifier on one row of features."""
  return linear(1, width, hidden) + linear(1, hidden or width, classes)


def ml_decoder(config: MLDecoderConfig, tokens: int, labels: int) -> Work:
  """On `tokens` of an image; `labels` is read by the zero-shot decoder alone, whose queries they are."""
  width, groups = config.width, min(config.groups, config.classes)
  queries = groups or labels
  work = linear(tokens, config.inputs, width) + linear(tokens, width, 2 * width) + linear(queries, width, 2 * width)
  work += attention(queries, tokens, width) + linear(queries, width, config.feed_forward) * 2
  if not groups and config.query_width != width:
    work += linear(queries, config.query_width, width)
  return work + linear(queries, width, -(-config.classes // groups) if groups else 1)


def inception_v3() -> Work:
  """FID's network on an image of 299 x 299 pixels; the classifier is left out."""
  works, width = [], 3
  stem = ((149, 32, 3), (147, 32, 3), (147, 64, 3), (73, 80, 1), (71, 192, 3))
  for side, outputs, kernel in stem:
    works.append(convolution(side**2, width, outputs, kernel))
    width = outputs
  side = 35
  for plan in inception.BLOCKS.values():
    width, after, work = _inception_steps((plan,), width, side)
    works.append(work)
    side = after
  return total(works)


def _inception_steps(steps: Sequence, width: int, side: int) -> tuple[int, int, Work]:
  """Width, side and work after the `steps` of a plan."""
  works = []
  for step in steps:
    if isinstance(step, inception.Beside):
      branches = [_inception_steps(branch, width, side) for branch in step.branches]
      width, side = sum(branch[0] for branch in branches), branches[0][1]
      works += [branch[2] for branch in branches]
    elif isinstance(step, inception.Conv):
      kernel = (step.kernel,) * 2 if isinstance(step.kernel, int) else step.kernel
      side = side if step.stride == 1 else (side - kernel[0]) // 2 + 1
      works.append(Work(convolution=2 * side**2 * kernel[0] * kernel[1] * width * step.outputs))
      width = step.outputs
    elif step is inception.halving_max_pool:
      side = (side - 3) // 2 + 1
  return width, side, total(works)
