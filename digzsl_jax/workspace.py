"""What the stages of DIG-ZSL share: its data, frozen models and settings.

Shapes: k class, t template, d embedding, l position, n vector of a class token.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, diffusion, features, fsdp, losses
from digzsl_jax.base_workspace import BATCH, LAYOUTS, BaseWorkspace, check, parse
from digzsl_jax.data import datasets, feature_files, pictures, prompts, splits, textual_inversion, tokenizer
from digzsl_jax.models import cdm, download, hub, inception, judge, layers, stable_diffusion

TOKENS = {"test": "learned_embeds.safetensors", "validation": "validation_embeds.safetensors"}  # by task
PROTOTYPES = ("text", "attributes")
OF_IMAGES = {"tokens", "generate", "quality"}  # the stages that a data set of features does without


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Where the frozen models are.

  Each is a local folder, `owner/name` or `owner/name@revision` of the hub, or `embedded:world/name`.

  Attributes:
    clip: CLIP with its tokenizer.
    sd: Stable Diffusion in the layout of diffusers, or a single local file.
    vae: another autoencoder for it, or "" for its own.
    judge: judge, or "" for none.
    dtype: of the computation of CLIP, Stable Diffusion and encoder: "float32", "bfloat16" or "mixed" (`layers.types`).
    prototypes: what stands for a class in CDM and tokens: "text" (CLIP's embedding of its name), "attributes" (the data
      set's), or an .npz file (`feature_files.read_prototypes`).
    prototype_template: prompt of "text", with `{name}`, or the name of a set of `prompts.TEMPLATES`, whose mean counts.
  """

  clip: str
  sd: str
  vae: str
  judge: str
  dtype: str
  prototypes: str
  prototype_template: str

  def __post_init__(self):
    check(self.dtype in layers.DTYPES, "dtype", self.dtype, f"one of {layers.DTYPES}")
    check(self.prototypes in PROTOTYPES or self.prototypes.endswith(".npz"), "prototypes", self.prototypes,
          f"one of {PROTOTYPES} or an .npz file")
    prompts.templates(self.prototype_template, field="prototype_template")


class Workspace(BaseWorkspace):
  """Data, frozen models and settings of DIG-ZSL."""

  @functools.cached_property
  def models(self) -> ModelSettings:
    return parse(ModelSettings, self.config["models"], "models")

  @property
  def model_names(self) -> dict[str, str]:
    """Field and value of every checkpoint that the config names; "cdm.encoder" only if it is not the run's CLIP."""
    encoder = self.config["cdm"]["encoder"]
    names = {f"models.{name}": getattr(self.models, name) for name in ("clip", "sd", "vae", "judge")}
    names["cdm.encoder"] = "" if encoder == cdm.CLIP else encoder
    names["generate.unet"] = self.config["generate"]["unet"]
    names["quality.inception"] = self.config["quality"]["inception"]
    return {field: name for field, name in names.items() if name}

  def admit(self, asked: Mapping[str, ModuleType]) -> None:
    """Raises ValueError if these stages need images that the data set has not, or a checkpoint that is not named."""
    has_images = self.dataset.has_images
    if not has_images and (wrong := sorted(OF_IMAGES & set(asked))):
      raise ValueError(f"config.stages: {wrong} make or compare images, but the data set has features in place of "
                       "images; leave them out")
    needed = {"sd"} & set(itertools.chain(*(module.MODELS for module in asked.values())))
    texts = has_images or self.models.prototypes == "text"
    for name in needed | ({"clip"} if texts else set()):
      if not getattr(self.models, name):
        raise ValueError(f"config.models.{name} is empty; these stages need a checkpoint there" + (
            "" if has_images else ', or config.models.prototypes other than "text"'))

  def needs(self, module: ModuleType) -> tuple[str, ...]:
    """The stages whose files a stage reads."""
    return tuple(name for name in module.NEEDS if self.dataset.has_images or name not in OF_IMAGES)

  @functools.cached_property
  def model_fingerprints(self) -> dict[str, Any]:
    """Of the files that are read of each checkpoint, None where the config names none, and of `initial_file`."""
    found = dict.fromkeys(LAYOUTS)
    for name, path in self.model_paths.items():
      if name == "sd" and path.is_file():
        stable_diffusion.tokenizer_folder(path)  # raises where there is none
      folder = path.parent if path.is_file() else path
      found[name] = checkpoint.fingerprint_files(folder, download.files(path, LAYOUTS[name]))
    if vae := found.pop("vae"):  # part of what stages know as "sd"
      found["sd"] = {"files": found["sd"], "vae": vae}
    start = self.initial_file and checkpoint.fingerprint_file(self.initial_file)
    texts = prompts.templates(self.models.prototype_template, field="prototype_template")
    given = self.models.prototypes != "text"
    prototypes = checkpoint.fingerprint(self.prototypes_kd.tolist()) if given else texts
    return found | {"clip": {"files": found["clip"], "texts": texts, "prototypes": prototypes}, "initial_file": start}

  @functools.cached_property
  def data_fingerprint(self) -> str:
    """Short SHA-256 of names, lists, labels and images."""
    return splits.fingerprint(self.dataset)[:16]

  @functools.cached_property
  def dataset(self) -> splits.Dataset:
    """The data set of the config, whose counts and notes go to the log."""
    dataset = datasets.load(self.config["data"])
    for line in (splits.summary(dataset), *dataset.notes):
      self.log.say(line)
    return dataset

  @functools.cached_property
  def tasks(self) -> dict[str, splits.Task]:
    """`validation` (seen classes treated as unseen, to choose settings) and `test`."""
    return splits.tasks(self.dataset)

  @functools.cached_property
  def sd(self) -> stable_diffusion.StableDiffusion:
    """Stable Diffusion; section `tokens` says whether its gradients save memory (`remat`).

    Raises:
      ValueError: no such checkpoint, or its tokenizer is another than the text encoder's; ids beyond both stand for
        learnt vectors.
    """
    return self._stable_diffusion(remat=self.config["tokens"]["remat"])

  def _stable_diffusion(self, **switches) -> stable_diffusion.StableDiffusion:
    """For errors see `sd`."""
    paths = self.model_paths
    with fsdp.on_host(self.mesh):
      sd = stable_diffusion.load(paths["sd"], vae=paths.get("vae"), dtype=self.models.dtype, **switches)
    rows, known = sd.text_encoder.embeddings.token_embedding.num_embeddings, self.sd_tokenizer.vocab_size
    if rows != known:
      raise ValueError(f"config.models.sd: the tokenizer of {self.models.sd} has {known} tokens, but the text encoder "
                       f"{rows}; take both folders from the same place")
    return sd

  @functools.cached_property
  def painter(self) -> stable_diffusion.StableDiffusion:
    """What paints the images: `sd`, with the denoiser of `generate.unet` where that names one."""
    if "unet" not in self.model_paths:
      return self.sd
    return self._stable_diffusion(denoiser=self.model_paths["unet"])

  @functools.cached_property
  def schedule(self) -> diffusion.Schedule:
    """The noise schedule of `sd`, without its weights."""
    return stable_diffusion.load_schedule(self.model_paths["sd"])

  @functools.cached_property
  def sd_tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.from_folder(stable_diffusion.tokenizer_folder(self.model_paths["sd"]))

  def token_prompts(self, task: splits.Task) -> tuple[np.ndarray, np.ndarray]:
    """Prompt ids of the task's unseen classes, `(learnt_kl, plain_kl)`.

    At the token's place stand ids beyond the vocabulary, one for each of its vectors, and in the plain prompts the
    initial word, once.
    """
    template, initial = self.config["tokens"]["template"], self.config["tokens"]["initial"]
    count = self.config["tokens"]["vectors"]
    names = [prompts.class_name(self.dataset.names[label]) for label in task.unseen]
    learnt = [self.sd_tokenizer.encode_with_slot(template, name, initial, count) for name in names]
    for ids_l, place in learnt:
      ids_l[place:place + count] = self.sd_tokenizer.vocab_size + np.arange(count)
    plain = [self.sd_tokenizer.encode_with_slot(template, name, initial) for name in names]
    return np.array([ids_l for ids_l, _ in learnt]), np.array([ids_l for ids_l, _ in plain])

  @property
  def initial_file(self) -> pathlib.Path | None:
    """The textual-inversion file that class tokens start from, or None.

    Raises:
      ValueError: there is no such file.
    """
    path = self.config["tokens"]["initial_file"]
    if path and not pathlib.Path(path).expanduser().is_file():
      raise ValueError(f"config.tokens.initial_file is {path!r}, but there is no such file")
    return pathlib.Path(path).expanduser() if path else None

  def file_starts(self) -> dict[str, np.ndarray]:
    """`{class name: vectors [n, d]}` out of `tokens.initial_file`; empty where none is given.

    Raises:
      ValueError: the file cannot be used (`textual_inversion.read`), lacks an unseen class, or has another number
        of vectors than `tokens.vectors`.
    """
    path, count, names = self.initial_file, self.config["tokens"]["vectors"], self.dataset.names
    if path is None:
      return {}
    found = textual_inversion.read(path, self.sd.text_width)
    if len(found) == 1 and not found.keys() & set(names):
      found = dict.fromkeys(names, *found.values())
    if missing := [names[label] for label in self.dataset.unseen if names[label] not in found]:
      raise ValueError(f"initial_file {path} has no vectors for the classes {missing}; give a file of one token, or "
                       f"one with a row for every unseen class. It holds {sorted(found)}")
    for name, vectors_nd in found.items():
      if len(vectors_nd) != count:
        raise ValueError(f"initial_file {path} has {len(vectors_nd)} vectors for {name!r}, but config.tokens.vectors "
                         f"is {count}; make both equal")
    return found

  def token_starts(self, task: splits.Task) -> np.ndarray:
    """`[k, n, d]`: what the tokens of the task's unseen classes start from."""
    word_nd = np.tile(self.initial_token, (self.config["tokens"]["vectors"], 1))
    names, found = [self.dataset.names[label] for label in task.unseen], self.file_starts()
    if found and (words := [name for name in names if name not in found]):
      self.log.say(f"tokens ({task.name}): {words} are not in {self.initial_file} and start from "
                   f"{self.config['tokens']['initial']!r}")
    return np.stack([found.get(name, word_nd) for name in names])

  @property
  def modules(self) -> dict[str, nnx.Module]:
    """Every frozen model of the config and the CDM's head, for the parameter table."""
    found = {"cdm": self.new_cdm_head()} | ({"clip": self.clip} if "clip" in self.model_paths else {})
    if "sd" in self.model_paths:
      found |= {f"sd.{part}": getattr(self.sd, part) for part in ("text_encoder", "unet", "vae")}
    if "unet" in self.model_paths:
      found["generate.unet"] = self.painter.unet
    return found | ({"judge": self.judge[0]} if self.judge else {})

  @functools.cached_property
  def initial_token(self) -> np.ndarray:
    """`[d]`: the embedding of the word that class tokens start from, unless `tokens.initial_file` says otherwise."""
    [word] = self.sd_tokenizer.ids(self.config["tokens"]["initial"])
    return np.asarray(self.sd.text_encoder.embed(jnp.array([[word]]))[0, 0])

  @functools.cached_property
  def judge_config(self) -> dict | None:
    """What names the judge's heads, without its weights; None where the world ships none."""
    if not self.models.judge:
      return None
    return hub.read_json(self.model_paths["judge"] / "config.json")

  @functools.cached_property
  def judge(self) -> tuple[judge.Judge, dict] | None:
    """The judge and its config; None where the world ships none."""
    if self.judge_config is None:
      return None
    return hub.load(judge.Judge, self.model_paths["judge"]), self.judge_config

  @functools.cached_property
  def cdm_encoder(self) -> cdm.Encoder:
    """The frozen part of the category discrimination model."""
    return cdm.load_encoder(self.model_paths.get("encoder", cdm.CLIP), self.clip, self.model_paths["clip"],
                            dtype=self.models.dtype)

  @functools.cached_property
  def inception(self) -> inception.InceptionV3:
    """FID's network, in float32 as in published numbers."""
    return inception.load(self.model_paths["inception"], resize=self.config["quality"]["resize"])

  def extractor(self, model: str) -> features.Extractor:
    """Feature rows of the CDM's "encoder", of the run's own "clip", or of FID's "inception"."""
    cache = self.config["cdm"]["cache"]
    folder = pathlib.Path(cache).expanduser() if cache else None
    if model == "inception":
      key = {"weights": self.model_fingerprints[model], "preprocess": self.inception.resize, "dtype": "float32"}
      return features.Extractor(cdm.streamed(self.inception, BATCH), key, folder, self.log)
    own = model == "clip" or "encoder" not in self.model_paths
    encoder = cdm.Encoder(self.clip, self.model_paths["clip"]) if own else self.cdm_encoder
    weights = self.model_fingerprints["clip"]["files"] if own else self.model_fingerprints["encoder"]
    key = {"weights": weights, "preprocess": str(encoder.preprocess), "dtype": self.models.dtype}
    of_files = isinstance(self.dataset.train[0], pictures.Pictures)
    stream = cdm.streamed(encoder, BATCH) if of_files else cdm.streamed(encoder)
    return features.Extractor(stream, key, folder, self.log)

  def abstract_features(self, labelled: splits.Labelled) -> jax.ShapeDtypeStruct:
    """Shape of the feature rows of a part of the data set, without computing any."""
    if isinstance(labelled, splits.LabelledFeatures):
      return jax.ShapeDtypeStruct(labelled.features_nf.shape, np.float32)
    return jax.eval_shape(self.cdm_encoder, jax.ShapeDtypeStruct(labelled.images_nhwc.shape, np.float32))

  def new_cdm_head(self) -> cdm.Head:
    """An untrained head of the kind that guides tokens."""
    section = self.config["cdm"]
    return cdm.Head(section["kind"], self.pooled_width, section["hidden"], self.prototypes_kd.shape[1],
                    rngs=nnx.Rngs(self.seed))

  @property
  def pooled_width(self) -> int:
    """Of the pooled part of a feature row, which is all of a row that came with the data set."""
    return self.cdm_encoder.width if self.dataset.has_images else self.dataset.train.features_nf.shape[1]

  def cdm_head(self, task: str) -> pathlib.Path:
    """The folder of a task's trained head, of the kind that guides tokens."""
    return self.folder("cdm") / f"{task}_{self.config['cdm']['kind']}"

  @functools.cached_property
  def prototypes_kd(self) -> np.ndarray:
    """What stands for the classes, unit vectors in the order of `dataset.names`.

    Raises:
      ValueError: the data set has no attributes, or the file has no vector, for a class.
    """
    if (source := self.models.prototypes) == "text":
      return self.text_prototypes_kd
    if source == "attributes" and (found_kd := self.dataset.attributes_ka) is None:
      raise ValueError(f'config.models.prototypes is "attributes", but {self.dataset.name} has none; use "text" or an '
                       ".npz file")
    if source != "attributes":
      found_kd = feature_files.read_prototypes(source, self.dataset.names)
    length_k = np.linalg.norm(found_kd, axis=1)
    if zero := [name for name, length in zip(self.dataset.names, length_k) if not length]:
      raise ValueError(f'config.models.prototypes is "attributes", but those of {zero} are all zero')
    return (found_kd / length_k[:, None]).astype(np.float32)

  @functools.cached_property
  def text_prototypes_kd(self) -> np.ndarray:
    """Unit CLIP text embeddings of all class names, the mean of all templates, in the order of `dataset.names`."""
    templates = prompts.templates(self.models.prototype_template, field="prototype_template")
    texts = list(itertools.chain(*prompts.expand(templates, self.dataset.names)))
    embeds_ktd = self.embed_texts(texts, "class prototypes").reshape(len(self.dataset.names), len(templates), -1)
    if len(templates) == 1:
      return embeds_ktd[:, 0]
    return np.asarray(losses.normalise(embeds_ktd.mean(1)))
