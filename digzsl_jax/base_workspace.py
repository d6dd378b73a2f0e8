"""What the stages of a run share whatever its method: folders of stages, mesh, log, CLIP and texts in its space.

Shapes: n text, d embedding.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from digzsl_jax import checkpoint, label_texts, mesh
from digzsl_jax.data import tokenizer
from digzsl_jax.logs import Log
from digzsl_jax.models import clip, download, hub, inception

T = TypeVar("T")
EMBEDDED = "embedded:"  # prefix of checkpoints that ship inside the package
PLACES = {("cdm", "cache")}  # fields that no result depends on
WORLDS = pathlib.Path(__file__).parent / "worlds"
# By the last word of the field that names a checkpoint.
LAYOUTS = {"clip": download.CLIP, "sd": download.STABLE_DIFFUSION, "vae": download.AUTOENCODER,
           "unet": download.DENOISER, "judge": download.ENCODER, "encoder": download.ENCODER,
           "inception": download.Layout(())}
# Pictures that a device encodes at once; arrays go in larger batches. Small ones keep both cores of a small CPU busy,
# also with the last of a list, while which nothing is left to decode.
BATCH = 32


def parse(kind: type[T], section: Mapping[str, Any], name: str) -> T:
  """Builds the dataclass `kind` from a config section.

  Raises:
    ValueError: a field that `kind` does not know, one that is missing, or a value it refuses.
  """
  known = {field.name for field in dataclasses.fields(kind)}
  if unknown := sorted(set(section) - known):
    raise ValueError(f"config.{name}: unknown fields {unknown}; known are {sorted(known)}")
  if missing := sorted(known - set(section)):
    raise ValueError(f"config.{name}: fields {missing} are missing")
  try:
    return kind(**section)
  except ValueError as error:
    raise ValueError(f"config.{name}.{error}") from error


def check(good: bool, field: str, value: Any, legal: str) -> None:
  """For `__post_init__` of settings: one message that names the field, its value and what is legal."""
  if not good:
    raise ValueError(f"{field} is {value!r}; it must be {legal}")


def resolve(name: str, field: str) -> pathlib.Path:
  """Where a checkpoint is: a local one, one of the hub, or `embedded:world/name`, which ships with the package.

  That of Inception is a local file.

  Raises:
    ValueError: there is none, or it is not whole; the message names `field`, as "models.clip".
  """
  if field == "quality.inception":
    try:
      return inception.locate(name)
    except hub.CheckpointError as error:
      raise ValueError(f"config.{field}: {error}") from error
  return locate(name, LAYOUTS[field.rpartition(".")[2]], f"config.{field}")


def locate(name: str, layout: download.Layout, said: str) -> pathlib.Path:
  """`resolve` of anything but Inception; `said` is what the message calls the field or flag."""
  path = str(WORLDS / name.removeprefix(EMBEDDED)) if name.startswith(EMBEDDED) else name
  try:
    return download.locate(path, layout)
  except hub.CheckpointError as error:
    shipped = [EMBEDDED + str(found.relative_to(WORLDS)) for found in sorted(WORLDS.glob("*/*/"))]
    raise ValueError(f"{said} is {name!r}, but {error}. A checkpoint is a local folder, owner/name or "
                     f"owner/name@revision of the hub, or one of {shipped}") from error


@dataclasses.dataclass
class BaseWorkspace:
  """Models are loaded when they are first used, so that a run whose stages are all there loads none.

  A method's own workspace adds `models` (its settings, with `dtype`), `model_names`, `model_fingerprints`,
  `data_fingerprint`, `modules` (for the parameter table), `needs` (the stages whose files a stage's module reads) and
  `admit`, which raises ValueError for stages that cannot run.

  Attributes:
    config: the resolved config, sections by stage name beside `seed`, `data`, `models`, `mesh`.
    stages: every stage of the method, by name, whether it runs or not.
    mesh: the devices.
  """

  config: Mapping[str, Any]
  workdir: pathlib.Path
  log: Log
  stages: dict[str, checkpoint.Stage] = dataclasses.field(default_factory=dict)
  mesh: jax.sharding.Mesh = dataclasses.field(init=False)

  def __post_init__(self):
    self.mesh = mesh.make(**self.config["mesh"])

  def stage(self, name: str, needs: tuple[str, ...], models: tuple[str, ...]) -> checkpoint.Stage:
    """The folder of stage `name`, fingerprinted by its section, seed, images, checkpoints and needed stages."""
    inputs = {"seed": self.seed, "dtype": self.models.dtype,
              "data": {**self.config["data"], "sha256": self.data_fingerprint},
              "models": {model: self.model_fingerprints[model] for model in models},
              name: {field: value for field, value in self.config[name].items() if (name, field) not in PLACES},
              "stages": {need: self.stages[need].fingerprint for need in needs}}
    self.stages[name] = checkpoint.Stage(self.workdir / name, inputs)
    return self.stages[name]

  def folder(self, name: str) -> pathlib.Path:
    """The folder of a finished stage."""
    return self.stages[name].require()

  @property
  def seed(self) -> int:
    return self.config["seed"]

  @functools.cached_property
  def model_paths(self) -> dict[str, pathlib.Path]:
    """Of every checkpoint that the config names, by the last word of its field; fetched if need be."""
    return {field.rpartition(".")[2]: resolve(name, field) for field, name in self.model_names.items()}

  @functools.cached_property
  def clip(self) -> clip.CLIPModel:
    return hub.load(clip.CLIPModel, self.model_paths["clip"], dtype=self.models.dtype)

  @functools.cached_property
  def clip_tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.from_folder(self.model_paths["clip"])

  def embed_texts(self, texts: Sequence[str], name: str) -> np.ndarray:
    """Unit CLIP embeddings `[n, d]` of texts; `name` is that of the progress bar."""
    return label_texts.encode(self.clip, self.clip_tokenizer, texts, lambda count: self.log.progress(count, name))
