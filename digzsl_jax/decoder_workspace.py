"""What the stages of CLIP-Decoder share: queries of labels, captions and the decoder's structure.

Shapes: n image, k label, t template, d embedding, w width of a query, x width of a caption's embedding.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, label_texts
from digzsl_jax.base_workspace import LAYOUTS, check, parse
from digzsl_jax.data import feature_files, prompts
from digzsl_jax.models import cdm, clip_decoder, download, layers, tresnet
from digzsl_jax.multilabel_workspace import MultilabelWorkspace

QUERIES = ("text", "random")
CLIP, FEATURES = "clip", "features"  # as encoder: the vision tower of the run's CLIP; none. The others are TResNets


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Where weights come from.

  Attributes:
    clip: CLIP with its tokenizer: a local folder, `owner/name` of the hub, or `embedded:world/name`.
    tresnet: weights that a TResNet starts from, a safetensors file or model folder; "" for fresh ones.
    dtype: of the computation: "float32", "bfloat16" or "mixed" (`layers.types`).
    queries: what asks for a label: "text" (CLIP's embedding of its name), "random" (an ablation: names mean nothing),
      or an .npz file of vectors such as GloVe's (`feature_files.read_prototypes`).
    template: prompt of "text" and of CLIP's own scores, with `{name}`, or the name of a set of `prompts.TEMPLATES`.
  """

  clip: str
  tresnet: str
  dtype: str
  queries: str
  template: str

  def __post_init__(self):
    check(self.dtype in layers.DTYPES, "dtype", self.dtype, f"one of {layers.DTYPES}")
    check(self.queries in QUERIES or self.queries.endswith(".npz"), "queries", self.queries,
          f"one of {QUERIES} or an .npz file")
    prompts.templates(self.template, field="template")


class DecoderWorkspace(MultilabelWorkspace):
  """Frozen models and settings of CLIP-Decoder."""

  @functools.cached_property
  def models(self) -> ModelSettings:
    return parse(ModelSettings, self.config["models"], "models")

  @functools.cached_property
  def tresnet_file(self) -> pathlib.Path | None:
    """Raises ValueError if there is no such file or folder."""
    path = pathlib.Path(self.models.tresnet).expanduser()
    if self.models.tresnet and not path.exists():
      raise ValueError(f"config.models.tresnet is {self.models.tresnet!r}, but there is no such file; ML-Decoder's are "
                       'converted with python -m digzsl_jax.convert, and "" starts from fresh weights')
    return path if self.models.tresnet else None

  @functools.cached_property
  def model_fingerprints(self) -> dict[str, Any]:
    """Of the files that are read of each checkpoint, and of what asks for labels."""
    path, file = self.model_paths["clip"], self.tresnet_file
    trunk = file and (checkpoint.fingerprint_folder(file) if file.is_dir() else checkpoint.fingerprint_file(file))
    given = self.models.queries if self.models.queries in QUERIES else checkpoint.fingerprint(
        self.query_vectors_kw.tolist())
    return {"clip": {"files": checkpoint.fingerprint_files(path, download.files(path, LAYOUTS["clip"])),
                     "texts": prompts.templates(self.models.template, field="template")},
            "queries": given, "tresnet": trunk}

  @property
  def modules(self) -> dict[str, nnx.Module]:
    """For the parameter table."""
    return {"clip": self.clip, "decoder": self.new_decoder()}

  @functools.cached_property
  def label_texts_kd(self) -> np.ndarray:
    """CLIP's embeddings of the names of all labels, the mean of all templates, each a unit vector."""
    return label_texts.of_labels(
        self.clip, self.clip_tokenizer, self.dataset.names, prompts.templates(self.models.template, field="template"),
        key="", cache=None, progress=lambda count: self.log.progress(count, "label texts"))

  @functools.cached_property
  def query_vectors_kw(self) -> np.ndarray:
    """What asks for each label, in the order of `dataset.names`.

    Every vector has the length of one with entries of order 1: beside a unit vector's small ones the bias of the layer
    that takes them would drown what tells labels apart.
    """
    if self.models.queries == "text":
      vectors_kw = self.label_texts_kd
    elif self.models.queries == "random":
      width = self.clip.text_projection.out_features
      vectors_kw = np.random.default_rng(self.seed).normal(size=(len(self.dataset.names), width))
    else:
      vectors_kw = feature_files.read_prototypes(self.models.queries, self.dataset.names)
    length_k = np.linalg.norm(vectors_kw, axis=1, keepdims=True)
    return (vectors_kw / length_k * vectors_kw.shape[1]**0.5).astype(np.float32)

  def caption_embeds(self, targets_nk: np.ndarray, names: list[str], prefix: str) -> np.ndarray:
    """Unit CLIP embeddings `[n, x]` of a caption for each image, of zeros where it has no label.

    Args:
      targets_nk: 1 where the image holds a label.
      names: of the columns; captions name no other labels.
      prefix: what a caption begins with.
    """
    fits = lambda text: len(self.clip_tokenizer.ids(text)) <= self.clip_tokenizer.length - 2  # start and end
    held_n = [[names[k] for k in np.flatnonzero(row == 1)] for row in targets_nk]
    texts_n = [prompts.caption(prefix, held, fits) if held else None for held in held_n]
    different = sorted({text for text in texts_n if text})
    place = {text: row for row, text in enumerate(different)}
    embeds_rx = self.embed_texts(different, "captions")
    embeds_nx = np.zeros((len(texts_n), embeds_rx.shape[1]), np.float32)
    for row, text in enumerate(texts_n):
      if text:
        embeds_nx[row] = embeds_rx[place[text]]
    return embeds_nx

  @property
  def closed(self) -> bool:
    """Whether the decoder is one of the seen labels alone, which no query can ask for another."""
    return self.config["train"]["groups"] > 0

  def new_encoder(self) -> clip_decoder.Tokens | None:
    """The image encoder that training starts from; None where the data set has features."""
    kind = self.config["train"]["encoder"]
    if kind == FEATURES:
      return None
    if kind == CLIP:
      tower = self.clip.vision_model
      return clip_decoder.Tokens(tower, cdm.Preprocess.from_folder(self.model_paths["clip"], tower.image_size))
    if self.tresnet_file:
      return clip_decoder.Tokens(self._stored_tresnet(kind))
    build = lambda: tresnet.TResNet.from_json(tresnet.VARIANTS[kind], dtype=self.models.dtype, rngs=nnx.Rngs(self.seed))
    return clip_decoder.Tokens(layers.initialised(build))

  def _stored_tresnet(self, kind: str) -> tresnet.TResNet:
    """That of `models.tresnet`; raises ValueError if it is another of the published ones than `kind`."""
    found = tresnet.load(self.tresnet_file, dtype=self.models.dtype)
    blocks = tuple(len(getattr(found.body, f"layer{stage}")) for stage in range(1, 5))
    held = next((name for name, fields in tresnet.VARIANTS.items() if fields["layers"] == blocks), kind)
    if held != kind:
      raise ValueError(f"config.train.encoder is {kind!r}, but config.models.tresnet, {self.models.tresnet!r}, holds "
                       f"TResNet-{held}; set config.train.encoder={held}, or name other weights")
    return found

  def new_decoder(self) -> clip_decoder.CLIPDecoder:
    """Encoder and untrained head, as section `train` describes them."""
    encoder, classes = self.new_encoder(), len(self.dataset.seen) if self.closed else 0
    width = self.dataset.train.images_nhwc.shape[-1] if encoder is None else encoder.width
    head = {"inputs": width, "query_width": self.query_vectors_kw.shape[1], "classes": classes,
            "groups": self.config["train"]["groups"] or 1, "width": self.config["train"]["width"],
            "heads": self.config["train"]["heads"], "feed_forward": self.config["train"]["feed_forward"],
            "dropout": self.config["train"]["dropout"]}
    captions, shared = self.clip.text_projection.out_features, self.config["train"]["shared"]
    model = layers.initialised(lambda: clip_decoder.CLIPDecoder(
        None, head, captions, shared, self.config["train"]["temperature"], dtype=self.models.dtype,
        rngs=nnx.Rngs(self.seed)))
    model.encoder = encoder
    return model

  def trained(self, path: tuple, value: nnx.Variable) -> bool:
    """Whether a variable of the decoder is trained: a filter of `nnx.split`."""
    return isinstance(value, nnx.Param) and (self.config["train"]["train_encoder"] or path[0] != "encoder")
