"""Category discrimination model (CDM, arXiv 2412.17219): a frozen image encoder and a trained head.

The head takes an image into the space of CLIP's text embeddings, where the class names are. It is
trained on real images of seen classes and then tells the class tokens how well a generated image shows
an unseen class, so everything from pixels to embedding is differentiable.

Features of an image, one row for every later use:
  CLIP         [pooled state of the vision tower | unit image embedding]   d + p numbers
  ViT, DINOv2  [class position after the last norm]                        d numbers
  SigLIP       [pooled state of the vision tower]                          d numbers

Shapes: n image, b batch, i j height and width, y x the same after resizing, c colour, f feature row, d width of
the encoder, p width of the text space.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import resize
from digzsl_jax.losses import normalise
from digzsl_jax.models import hub, layers, platforms
from digzsl_jax.models.clip import CLIPModel
from digzsl_jax.models.dinov2 import Dinov2Model
from digzsl_jax.models.siglip import SiglipVisionModel
from digzsl_jax.models.vit import ViT

KINDS = ("residual", "mlp")
AHEAD = 2  # batches that are read while one is encoded
PART = 8  # images at a time on a CPU, whose cache holds what lies between layers then
AXIS = "image"  # over which a batch is divided among devices
CLIP = "clip"  # name of the run's own CLIP where an encoder is asked for; anything else is a folder
GUIDES = ("cdm", CLIP)  # of class tokens: the trained model, or CLIP as it is
MODELS = {"clip": CLIPModel, "dinov2": Dinov2Model, "siglip": SiglipVisionModel,
          "siglip_vision_model": SiglipVisionModel, "vit": ViT}  # by `model_type` of the folder's config.json


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """From images in [-1, 1] of any size to what the encoder was trained on, differentiably.

  Attributes:
    size: height and width that the encoder takes.
    mean: of each colour, for images in [0, 1].
    std: of each colour.
    shortest: what the shorter side becomes before the crop; None for `size`.
  """

  size: int
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  shortest: int | None = None

  @classmethod
  def from_folder(cls, folder: os.PathLike, size: int | None) -> "Preprocess":
    """What `preprocessor_config.json` says; without that file mean and std are 0.5, as Google's ViTs have it.

    Args:
      folder: of the encoder.
      size: height and width that the encoder takes; None where any will do, and then the file must be
        there and say both the size and what is cut off (DINOv2: 256 to the central 224).

    Raises:
      CheckpointError: the file is absent but needed, damaged, or gives other than three means and three
        positive stds.
    """
    path, shortest = pathlib.Path(folder) / "preprocessor_config.json", None
    stored = hub.read_json(path) if size is None or path.is_file() else {}
    if size is None:
      shortest = _side(stored, "size", path)
      size = _side(stored, "crop_size", path) if stored.get("do_center_crop") else shortest
      if size > shortest:
        raise hub.CheckpointError(f"{path}: crop_size {size} is more than size {shortest}; download it again")
    try:
      mean = tuple(map(float, stored.get("image_mean") or cls.mean))
      std = tuple(map(float, stored.get("image_std") or cls.std))
    except TypeError as error:
      raise hub.CheckpointError(f"{path}: image_mean and image_std must be lists of numbers ({error}); "
                                "download it again") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
      raise hub.CheckpointError(f"{path}: image_mean {mean} and image_std {std} must be three numbers each, "
                                "the stds positive")
    return cls(size, mean, std, shortest)

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    """Shorter side to `shortest` (bicubic with antialias, as Pillow), centre crop to `size`, normalise."""
    sides = images_bijc.shape[1:3]
    *scaled, top, left = resize.fit(*sides, self.shortest or self.size, self.size)
    rows, columns = slice(top, top + self.size), slice(left, left + self.size)
    if sides == tuple(scaled):
      images_bijc = images_bijc[:, rows, columns]
    else:
      down, across = (resize.weights(*pair)[kept] for *pair, kept in zip(sides, scaled, (rows, columns)))
      images_bijc = jnp.einsum("yi,xj,bijc->byxc", down, across, images_bijc, precision="highest")
    # (x / 2 + 1 / 2 - mean) / std, in the form that leaves x as it is for mean = std = 1 / 2
    return (images_bijc - (2 * np.array(self.mean, np.float32) - 1)) * (0.5 / np.array(self.std, np.float32))


def _side(stored: Mapping, field: str, path: pathlib.Path) -> int:
  """The shorter side of a size as image processors write it: a number, or a dict of sides."""
  value = stored.get(field)
  side = min(value.values(), default=None) if isinstance(value, Mapping) else value
  if not isinstance(side, int) or side < 1:
    raise hub.CheckpointError(f"{path}: {field} is {value!r}, wanted a size in pixels; download it again")
  return side


class Encoder(nnx.Module):
  """A frozen model of images with its preprocessing; the module's docstring says what it returns.

  Attributes:
    tower: images to `(pooled_bd, out)`.
    projection: of CLIP, from the pooled state to the text space; None for models without one.
    width: d of the pooled state.
  """

  def __init__(self, model: CLIPModel | Dinov2Model | SiglipVisionModel | ViT, folder: os.PathLike):
    """`folder` is where the model comes from: its preprocessing stands there."""
    is_clip = isinstance(model, CLIPModel)
    self.tower, self.projection = (model.vision_model, model.visual_projection) if is_clip else (model, None)
    self.width = self.tower.width
    self.preprocess = Preprocess.from_folder(folder, self.tower.image_size)

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    """Features `[b, f]`, float32, of images in [-1, 1]."""
    pooled_bd, _ = self.tower(self.preprocess(images_bijc))
    if self.projection is None:
      return pooled_bd.astype(jnp.float32)
    embeds_bp = normalise(self.projection(pooled_bd).astype(jnp.float32))
    return jnp.concatenate([pooled_bd.astype(jnp.float32), embeds_bp], axis=-1)


def load_encoder(name: str | os.PathLike, clip: CLIPModel, clip_folder: os.PathLike, *,
                 dtype=jnp.float32) -> Encoder:
  """The encoder `name`: "clip" for the run's own, else a folder of the hub whose `model_type` is in `MODELS`.

  Raises:
    CheckpointError: that folder is absent, damaged or of another type.
  """
  if name == CLIP:
    return Encoder(clip, clip_folder)
  folder = pathlib.Path(name).expanduser()
  model_type = hub.read_json(folder / "config.json").get("model_type", "vit")
  if model_type not in MODELS:
    raise hub.CheckpointError(f"{folder / 'config.json'}: model_type {model_type!r} is no encoder of images that "
                              f"is supported; use a folder of one of {', '.join(MODELS)}")
  return Encoder(hub.load(MODELS[model_type], folder, dtype=dtype), folder)


class Head(nnx.Module):
  """The trained part.

  "mlp": `W2 relu(W1 f + b1) + b2` of the pooled feature, the paper's (section 3 of arXiv 2412.17219;
  depth and hidden width are not given there).
  "residual": `e + W2 relu(W1 e + b1) + b2` of CLIP's unit image embedding e, with W2 = b2 = 0 at first, so
  that training starts from zero-shot CLIP (after CLIP-Adapter, arXiv 2110.04544, without its fixed mix).
  """

  def __init__(self, kind: str, width: int, hidden: int, outputs: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
    """`width` of the encoder's pooled feature, `outputs` of the text space."""
    if kind not in KINDS:
      raise ValueError(f"kind of head is {kind!r}; it must be one of {KINDS}")
    self.kind, self.width, self.outputs = kind, width, outputs
    self.fc1 = layers.linear(outputs if kind == "residual" else width, hidden, dtype=dtype, rngs=rngs)
    init = nnx.initializers.zeros if kind == "residual" else layers.LECUN
    self.fc2 = layers.linear(hidden, outputs, kernel_init=init, dtype=dtype, rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "Head":
    return cls(config["kind"], config["width"], config["hidden"], config["outputs"], dtype=dtype, rngs=rngs)

  def __call__(self, features_bf: jax.Array) -> jax.Array:
    """Embeddings `[b, p]`, of any norm, of feature rows."""
    if self.kind == "residual":
      embeds_bp = features_bf[:, -self.outputs:]
      return embeds_bp + self.fc2(jax.nn.relu(self.fc1(embeds_bp)))
    return self.fc2(jax.nn.relu(self.fc1(features_bf[:, :self.width])))


class CDM(nnx.Module):
  """Images in [-1, 1] to embeddings that are compared with prototypes by cosine."""

  def __init__(self, encoder: Encoder, head: Head):
    if head.kind == "residual" and encoder.projection is None:
      raise ValueError('a "residual" head corrects CLIP\'s image embedding, which this encoder has not: use kind '
                       '"mlp"')
    if head.width != encoder.width:
      raise ValueError(f"the head takes features of width {head.width}, the encoder gives {encoder.width}: "
                       "use the encoder it was trained with, or train stage cdm anew")
    self.encoder = encoder
    self.head = head

  def __call__(self, images_bijc: jax.Array) -> jax.Array:
    """`[b, p]`, of any norm."""
    return self.head(self.encoder(images_bijc))


def save_head(head: Head, folder: os.PathLike) -> None:
  """Writes `config.json` and `model.safetensors`."""
  config = {"kind": head.kind, "width": head.width, "hidden": head.fc1.out_features, "outputs": head.outputs}
  hub.save(head, folder, config, dtype=np.float32)


def load_head(folder: os.PathLike) -> Head:
  """Reads what `save_head` wrote: enough where features are at hand.

  Raises:
    CheckpointError: the folder is absent, damaged or does not fit.
  """
  return hub.load(Head, folder)


def load(encoder: Encoder, folder: os.PathLike) -> CDM:
  """The whole model: `encoder` and the head of `folder`, `<stage cdm>/<task>_<kind>`.

  Raises:
    CheckpointError: as `load_head`.
    ValueError: the head was trained on another encoder.
  """
  return CDM(encoder, load_head(folder))


def zero_shot(clip: CLIPModel, folder: os.PathLike) -> CDM:
  """The model without training: CLIP's unit image embeddings, which an untrained "residual" head leaves as they are.

  `folder` is that of `clip`.
  """
  encoder = Encoder(clip, folder)
  return CDM(encoder, Head("residual", encoder.width, 1, encoder.projection.out_features, rngs=nnx.Rngs(0)))


def streamed(model: nnx.Module, batch: int = 256) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
  """`model` as a function of uint8 images `[n, i, j, c]` that yields their features, batch by batch.

  Every device of this process takes `batch` images at a time, so that a row does not depend on how many there are.
  Batches have one shape: one compilation. The images may be any object with a length and slices that are arrays; the
  next slices are asked for in other threads while some are encoded.

  Args:
    model: maps images in [-1, 1] to rows `[b, f]`: an `Encoder`, or `InceptionV3` of `models/inception.py`.
    batch: of the compiled model, on one device; the last one is filled up.

  Raises:
    ValueError: images that are not uint8, when they are read.
  """
  graphdef, params = nnx.split(model)
  devices = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
  place = lambda spec: jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*spec))
  params, batch = jax.device_put(params, place([])), batch * devices.size

  def read(images_nijc, start: int) -> tuple[np.ndarray, int]:
    rows = images_nijc[start:start + batch]
    if rows.dtype != np.uint8 or rows.ndim != 4:
      raise ValueError(f"images are uint8 [n, i, j, c], not {rows.dtype} {list(rows.shape)}")
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)]), len(rows)

  def stream(images_nijc):
    starts, encoding = iter(range(0, len(images_nijc), batch)), None
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as readers:
      reading = collections.deque(readers.submit(read, images_nijc, start) for start in itertools.islice(starts, AHEAD))
      while reading:
        padded, count = reading.popleft().result()
        reading.extend(readers.submit(read, images_nijc, start) for start in itertools.islice(starts, 1))
        placed = jax.device_put(padded, place([AXIS]))
        behind, encoding = encoding, (encode(graphdef, devices, params, placed), count)
        if behind:  # fetched once the next batch is under way
          yield np.asarray(behind[0])[:behind[1]]
    if encoding:
      yield np.asarray(encoding[0])[:encoding[1]]

  return stream


@functools.partial(jax.jit, static_argnums=(0, 1))  # outside of `streamed`, so that a second one compiles nothing
def encode(graphdef: nnx.GraphDef, devices: jax.sharding.Mesh, params: nnx.State, images_bijc: jax.Array) -> jax.Array:
  """The compiled step of `streamed`: features of uint8 images, divided among `devices`."""
  def one(params, images_bijc):
    some = lambda images_bijc: nnx.merge(graphdef, params)(images_bijc.astype(jnp.float32) / 127.5 - 1)
    if platforms.platform() != "cpu" or len(images_bijc) % PART:
      return some(images_bijc)
    parts = jax.lax.map(some, images_bijc.reshape(-1, PART, *images_bijc.shape[1:]))
    return parts.reshape(-1, *parts.shape[2:])

  rows = jax.sharding.PartitionSpec(AXIS)
  return jax.shard_map(one, mesh=devices, in_specs=(jax.sharding.PartitionSpec(), rows), out_specs=rows,
                       check_vma=False)(params, images_bijc)


def batched(model: nnx.Module, batch: int = 256) -> Callable[[np.ndarray], np.ndarray]:
  """`streamed` with all features at once."""
  stream = streamed(model, batch)
  return lambda images_nijc: np.concatenate(list(stream(images_nijc)))
