"""What the stages of TagCLIP share: prompts of labels and background, pictures at their own size, the model.

Shapes: n picture, f label, k class: labels, then background, p width of the shared space.
"""

import dataclasses
import functools
import pathlib
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, label_texts
from digzsl_jax.base_workspace import LAYOUTS, check, parse
from digzsl_jax.data import label_lists, native, prompts
from digzsl_jax.models import cdm, clip, download, hub, layers, tagclip
from digzsl_jax.multilabel_workspace import MultilabelWorkspace


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Which CLIP, and how it is told of the labels.

  Attributes:
    clip: CLIP with its tokenizer: a local folder, `owner/name` of the hub, or `embedded:world/name`.
    dtype: of the computation: "float32", "bfloat16" or "mixed" (`layers.types`).
    template: prompt with `{name}`, or the name of a set of `prompts.TEMPLATES`: published "tagclip85".
    names: list of `label_lists.LISTS` whose names stand for the data set's own, label by label; "" for its own.
    background: list of `label_lists.LISTS` whose background takes part in every softmax; "" for none.
    cache: folder in which embeddings of labels are kept for other runs; "" keeps none.
  """

  clip: str
  dtype: str
  template: str
  names: str
  background: str
  cache: str

  def __post_init__(self):
    check(self.dtype in layers.DTYPES, "dtype", self.dtype, f"one of {layers.DTYPES}")
    for field in ("names", "background"):
      check(getattr(self, field) in ("", *label_lists.LISTS), field, getattr(self, field),
            f'"" or one of {list(label_lists.LISTS)}')
    prompts.templates(self.template, field="template")


class TagWorkspace(MultilabelWorkspace):
  """Frozen CLIP and texts of TagCLIP."""

  def needs(self, module: ModuleType) -> tuple[str, ...]:
    """With those of `module.IF_THERE` that are asked for too, or were made before."""
    asked = self.config["stages"]
    return *module.NEEDS, *(name for name in getattr(module, "IF_THERE", ())
                            if name in asked or (self.workdir / name / "done.json").exists())

  @functools.cached_property
  def models(self) -> ModelSettings:
    return parse(ModelSettings, self.config["models"], "models")

  @property
  def layers(self) -> int:
    """Of the vision tower, which need not be loaded for it."""
    vision = hub.read_json(self.model_paths["clip"] / "config.json")["vision_config"]
    return clip.VisionConfig.from_json(vision).num_hidden_layers

  @property
  def templates(self) -> tuple[str, ...]:
    """Of the prompts of labels and background."""
    return prompts.templates(self.models.template, field="template")

  @functools.cached_property
  def clip_fingerprint(self) -> str:
    path = self.model_paths["clip"]
    return checkpoint.fingerprint_files(path, download.files(path, LAYOUTS["clip"]))

  @functools.cached_property
  def model_fingerprints(self) -> dict[str, Any]:
    """Of the files that are read of CLIP, and of what it is told."""
    texts = [*self.names, "", *self.background, "", *self.templates]
    return {"clip": self.clip_fingerprint, "texts": checkpoint.fingerprint(texts)}

  @property
  def modules(self) -> dict[str, nnx.Module]:
    """For the parameter table."""
    return {"clip": self.clip}

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """Of the labels, as prompts have them.

    Raises:
      ValueError: the list of the config has another number of names than the data set has labels.
    """
    return self.listed(self.models.names, "models.names") if self.models.names else self.dataset.names

  def listed(self, name: str, field: str, lists=label_lists.LISTS) -> tuple[str, ...]:
    """Names of the list `name`; raises ValueError if they do not fit the data set's labels one by one."""
    names = lists[name].names
    if len(names) != len(self.dataset.names):
      raise ValueError(f"config.{field} is {name!r}, a list of {len(names)} names, but {self.dataset.name} has "
                       f'{len(self.dataset.names)} labels; choose the list of this data set, or "" for its own names')
    return names

  @functools.cached_property
  def background(self) -> tuple[str, ...]:
    """Names beside the labels, less those that are labels."""
    listed = label_lists.LISTS[self.models.background].background if self.models.background else ()
    return prompts.beside(listed, self.names)

  @functools.cached_property
  def texts_kp(self) -> np.ndarray:
    """Unit embeddings of labels and background."""
    return self.embed_labels((*self.names, *self.background), self.templates)

  def embed_labels(self, names: tuple[str, ...], templates: tuple[str, ...]) -> np.ndarray:
    """Unit embeddings `[k, p]` of names, each the mean over templates."""
    cache = pathlib.Path(self.models.cache).expanduser() if self.models.cache else None
    return label_texts.of_labels(self.clip, self.clip_tokenizer, names, templates, key=self.clip_fingerprint,
                                 cache=cache, progress=lambda count: self.log.progress(count, "label texts"))

  @functools.cached_property
  def preprocess(self) -> cdm.Preprocess:
    return cdm.Preprocess.from_folder(self.model_paths["clip"], self.clip.vision_model.image_size)

  def pictures(self, most_patches: int) -> native.Native:
    """The test pictures at their own size."""
    images, patch = self.dataset.test.images_nhwc, self.clip.vision_model.embeddings.patch_size
    if isinstance(images, np.ndarray):
      return native.ArrayPictures(images, patch, most_patches)
    return native.NativePictures(images.folder, images.files, patch, most_patches)

  def scores(self) -> dict[str, np.ndarray]:
    """What stage tags left, `[n, f]` by step of the method."""
    return checkpoint.read_arrays(self.folder("tags") / "scores.safetensors")

  def tags(self, scores_nf: np.ndarray) -> np.ndarray:
    """The tags that scores decide, bool `[n, f]`."""
    return np.asarray(tagclip.tags(jnp.asarray(scores_nf), self.config["tags"]["threshold"]))
