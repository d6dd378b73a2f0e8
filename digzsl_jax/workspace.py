"""What the stages of one run share: its data, frozen models, mesh, log and the folders of other stages.

Shapes: k class, d embedding, l position.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, diffusion, losses, mesh
from digzsl_jax.data import datasets, prompts, splits, tokenizer
from digzsl_jax.logs import Log
from digzsl_jax.models import cdm, clip, download, hub, judge, stable_diffusion

T = TypeVar("T")
EMBEDDED = "embedded:"  # prefix of checkpoints that ship inside the package
TOKENS = {"test": "learned_embeds.safetensors", "validation": "validation_embeds.safetensors"}  # by task
WORLDS = pathlib.Path(__file__).parent / "worlds"
LAYOUTS = {"clip": download.CLIP, "sd": download.STABLE_DIFFUSION, "judge": download.ENCODER,
           "encoder": download.ENCODER}  # by the last word of the field that names a checkpoint


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
  """Folder of a checkpoint: a local one, one of the hub, or `embedded:world/name`, which ships with the package.

  Raises:
    ValueError: there is none, or it is not whole; the message names `field`, as "models.clip".
  """
  path = str(WORLDS / name.removeprefix(EMBEDDED)) if name.startswith(EMBEDDED) else name
  try:
    return download.locate(path, LAYOUTS[field.rpartition(".")[2]])
  except hub.CheckpointError as error:
    shipped = [EMBEDDED + str(found.relative_to(WORLDS)) for found in sorted(WORLDS.glob("*/*/"))]
    raise ValueError(f"config.{field} is {name!r}, but {error}. A checkpoint is a local folder, owner/name or "
                     f"owner/name@revision of the hub, or one of {shipped}") from error


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Where the frozen models are.

  Each is a local folder, `owner/name` or `owner/name@revision` of the hub, or `embedded:world/name`.

  Attributes:
    clip: CLIP with its tokenizer.
    sd: Stable Diffusion in the layout of diffusers.
    judge: judge, or "" for none.
    prototype_template: prompt of the class prototypes, with `{name}`.
  """

  clip: str
  sd: str
  judge: str
  prototype_template: str

  def __post_init__(self):
    prompts.check_template(self.prototype_template, field="prototype_template")


@dataclasses.dataclass
class Workspace:
  """Models are loaded when they are first used, so that a run whose stages are all there loads none.

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
    self.mesh = mesh.make(self.config["mesh"]["devices"])

  def stage(self, name: str, needs: tuple[str, ...], models: tuple[str, ...]) -> checkpoint.Stage:
    """The folder of stage `name`, fingerprinted by its section, seed, images, checkpoints and needed stages."""
    inputs = {"seed": self.seed, "data": {**self.config["data"], "sha256": self.data_fingerprint},
              "models": {model: self.model_fingerprints[model] for model in models}, name: self.config[name],
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
  def models(self) -> ModelSettings:
    return parse(ModelSettings, self.config["models"], "models")

  @functools.cached_property
  def model_folders(self) -> dict[str, pathlib.Path]:
    """Of every checkpoint that the config names, fetched if need be; "encoder" is the CDM's, if it is not CLIP."""
    encoder = self.config["cdm"]["encoder"]
    names = {f"models.{name}": getattr(self.models, name) for name in ("clip", "sd", "judge")}
    names["cdm.encoder"] = "" if encoder == cdm.CLIP else encoder
    return {field.rpartition(".")[2]: resolve(name, field) for field, name in names.items() if name}

  @functools.cached_property
  def model_fingerprints(self) -> dict[str, Any]:
    """Of the files that are read of each checkpoint, None where the config names none."""
    found = dict.fromkeys(LAYOUTS)
    for name, folder in self.model_folders.items():
      found[name] = checkpoint.fingerprint_files(folder, download.files(folder, LAYOUTS[name]))
    return found | {"clip": {"files": found["clip"], "prototypes": self.models.prototype_template}}

  @functools.cached_property
  def data_fingerprint(self) -> str:
    """Short SHA-256 of names, lists, labels and images."""
    return splits.fingerprint(self.dataset)[:16]

  @functools.cached_property
  def dataset(self) -> splits.Dataset:
    """The data set of the config, whose counts go to the log."""
    dataset = datasets.load(self.config["data"])
    self.log.say(splits.summary(dataset))
    return dataset

  @functools.cached_property
  def tasks(self) -> dict[str, splits.Task]:
    """`validation` (seen classes treated as unseen, to choose settings) and `test`."""
    return splits.tasks(self.dataset)

  @functools.cached_property
  def clip(self) -> clip.CLIPModel:
    return hub.load(clip.CLIPModel, self.model_folders["clip"])

  @functools.cached_property
  def clip_tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.from_folder(self.model_folders["clip"])

  @functools.cached_property
  def sd(self) -> stable_diffusion.StableDiffusion:
    """Stable Diffusion; section `tokens` says whether its gradients save memory (`remat`)."""
    return stable_diffusion.load(self.model_folders["sd"], remat=self.config["tokens"]["remat"])

  @functools.cached_property
  def schedule(self) -> diffusion.Schedule:
    """The noise schedule of `sd`, without its weights."""
    return stable_diffusion.load_schedule(self.model_folders["sd"])

  @functools.cached_property
  def sd_tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.from_folder(self.model_folders["sd"] / "tokenizer")

  def token_prompts(self, task: splits.Task) -> tuple[np.ndarray, np.ndarray]:
    """Prompt ids `[k, l]` of the task's unseen classes, the initial word at the token's place, and that place."""
    template, initial = self.config["tokens"]["template"], self.config["tokens"]["initial"]
    names = [prompts.class_name(self.dataset.names[label]) for label in task.unseen]
    encoded = [self.sd_tokenizer.encode_with_slot(template, name, initial) for name in names]
    ids_kl, slot_k = map(np.array, zip(*encoded))
    return ids_kl, slot_k

  @property
  def modules(self) -> dict[str, nnx.Module]:
    """Every frozen model and the CDM's head, for the parameter table."""
    sd = self.sd
    found = {"clip": self.clip, "cdm": self.new_cdm_head(), "sd.text_encoder": sd.text_encoder, "sd.unet": sd.unet,
             "sd.vae": sd.vae}
    return found | ({"judge": self.judge[0]} if self.judge else {})

  @functools.cached_property
  def initial_token(self) -> np.ndarray:
    """`[d]`: the embedding of the word that every class token starts from."""
    [word] = self.sd_tokenizer.ids(self.config["tokens"]["initial"])
    return np.asarray(self.sd.text_encoder.embed(jnp.array([[word]]))[0, 0])

  @functools.cached_property
  def judge_config(self) -> dict | None:
    """What names the judge's heads, without its weights; None where the world ships none."""
    if not self.models.judge:
      return None
    return hub.read_json(self.model_folders["judge"] / "config.json")

  @functools.cached_property
  def judge(self) -> tuple[judge.Judge, dict] | None:
    """The judge and its config; None where the world ships none."""
    if self.judge_config is None:
      return None
    return hub.load(judge.Judge, self.model_folders["judge"]), self.judge_config

  @functools.cached_property
  def cdm_encoder(self) -> cdm.Encoder:
    """The frozen part of the category discrimination model."""
    return cdm.load_encoder(self.model_folders.get("encoder", cdm.CLIP), self.clip, self.model_folders["clip"])

  def new_cdm_head(self) -> cdm.Head:
    """An untrained head of the kind that guides tokens."""
    section = self.config["cdm"]
    return cdm.Head(section["kind"], self.cdm_encoder.width, section["hidden"], self.prototypes_kd.shape[1],
                    rngs=nnx.Rngs(self.seed))

  def cdm_head(self, task: str) -> pathlib.Path:
    """The folder of a task's trained head, of the kind that guides tokens."""
    return self.folder("cdm") / f"{task}_{self.config['cdm']['kind']}"

  @functools.cached_property
  def prototypes_kd(self) -> np.ndarray:
    """Unit CLIP text embeddings of all class names, rows in the order of `dataset.names`."""
    texts = [prompts.prompt(self.models.prototype_template, name) for name in self.dataset.names]
    graphdef, params = nnx.split(self.clip)
    encode = jax.jit(lambda params, ids: losses.normalise(nnx.merge(graphdef, params).encode_text(ids)[0]))
    return np.asarray(encode(params, jnp.asarray(self.clip_tokenizer(texts))))
