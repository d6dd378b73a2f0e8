"""TagCLIP (arXiv 2312.12828): scores of labels for pictures at their own size, by a frozen CLIP. Nothing is trained.

Pictures are sorted into few padded shapes, each compiled once (`data/native.py`). What is finished is written every
minute, and an interrupted stage goes on behind it.

Leaves `scores.safetensors`, `[n, f]` each, by stage of the method: `global` (softmax of the whole picture, squashed to
the model's size, over labels and background), `patch` (best patch of the coarse scores), `dmar` (of the refined ones),
`tagclip` (after the second look).

Shapes: n test picture, b picture of a batch, f label, k class: labels, then background.
"""

import dataclasses
import pathlib
import time

import numpy as np

from digzsl_jax import checkpoint, label_texts, metrics
from digzsl_jax.base_workspace import BATCH, check
from digzsl_jax.data import native
from digzsl_jax.models import affinity, cdm
from digzsl_jax.tag_workspace import TagWorkspace
from digzsl_jax.tagger import Rules, Tagger

NEEDS = ()
MODELS = ("clip", "texts")
GLOBAL, PATCH, DMAR, TAGCLIP = "global", "patch", "dmar", "tagclip"  # stages of the method, whose scores are compared
SAVE_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Settings:
  """How pictures are scored. Published values are for CLIP ViT-B/16 with its 12 layers.

  Attributes:
    first_layer: attention is averaged from this layer to the last but one: published 8, for COCO-Stuff 0.
    votes: so many layers must give a weight above their mean for it to count: published 4.
    threshold: of candidates and of tags, between the lowest and the highest score: published 0.5, for COCO-Stuff 0.1.
    compat: does as the released code where that looks like an oversight (`models/tagclip.py`).
    most_patches: larger pictures are reduced to so many patches; what attention needs grows with their square.
    buckets: padded shapes, at most; each is compiled once.
    pictures: that a device takes at a time.
    crops: second looks that a device takes at a time.
  """

  first_layer: int
  votes: int
  threshold: float
  compat: bool
  most_patches: int
  buckets: int
  pictures: int
  crops: int

  def __post_init__(self):
    check(0 <= self.threshold < 1, "threshold", self.threshold, "at least 0 and below 1")
    for field in ("most_patches", "buckets", "pictures", "crops"):
      check(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")

  @property
  def rules(self) -> Rules:
    return Rules(self.first_layer, self.votes, self.threshold, self.compat)


def validate(settings: Settings, ws: TagWorkspace) -> None:
  """Raises ValueError if there are no images, the model has too few layers, or labels cannot be told or read."""
  if not ws.dataset.has_images:
    raise ValueError(f"{ws.dataset.name} has features in place of images, which TagCLIP cannot score")
  affinity.check(ws.layers, settings.first_layer, settings.votes)
  label_texts.check((*ws.names, *ws.background), ws.templates, ws.clip_tokenizer)


def run(settings: Settings, ws: TagWorkspace, folder: pathlib.Path) -> dict:
  """Scores all test pictures."""
  scores = global_scores(ws)
  pictures = ws.pictures(settings.most_patches)
  buckets = native.plan(pictures.grids_n2, settings.buckets)
  ws.log.say("tags: padded shapes in patches (pictures): " + ", ".join(
      f"{bucket.rows}x{bucket.columns} ({len(bucket.members)})" for bucket in buckets))
  tagger = Tagger(ws.clip, ws.preprocess, ws.texts_kp, len(ws.names), settings.rules, pictures=settings.pictures,
                  crops=settings.crops, devices=ws.mesh.local_devices)
  found = score(tagger, pictures, buckets, ws, folder)
  looks = int(found.pop("looks"))
  checkpoint.write_arrays(folder / "scores.safetensors", {GLOBAL: scores} | found)
  (folder / "partial.safetensors").unlink(missing_ok=True)
  padded = sum(bucket.rows * bucket.columns * len(bucket.members) for bucket in buckets)
  return {"pictures": len(pictures), "shapes": len(buckets), "looks": looks,
          "padding": round(1 - float(pictures.grids_n2.prod(1).sum()) / padded, 4)}


def score(tagger: Tagger, pictures: native.Native, buckets: list[native.Bucket], ws: TagWorkspace,
          folder: pathlib.Path) -> dict[str, np.ndarray]:
  """`[n, f]` of every stage but the global one, and how many second looks there were, as `looks`."""
  n, saved = len(pictures), time.monotonic()
  like = {name: np.zeros((n, len(ws.names)), np.float32) for name in (PATCH, DMAR, TAGCLIP)}
  like |= {"looks": np.zeros((), np.int64), "done_n": np.zeros(n, np.int8)}
  found = checkpoint.load_state(folder / "partial.safetensors", like) or like
  # A batch is finished as a whole, so those that are left are those of an undisturbed run.
  left = [bucket._replace(members=bucket.members[found["done_n"][bucket.members] == 0]) for bucket in buckets]
  with ws.log.progress(n, "tags", int(found["done_n"].sum())) as bar:
    for scored in tagger.stream(pictures, left):
      for name, scores_bf in ((PATCH, scored.patch_bf), (DMAR, scored.refined_bf), (TAGCLIP, scored.scores_bf)):
        found[name][scored.rows_b] = scores_bf
      found["looks"] = found["looks"] + scored.looks
      found["done_n"][scored.rows_b] = 1
      bar.update(len(scored.rows_b))
      if time.monotonic() > saved + SAVE_SECONDS:
        checkpoint.save_state(folder / "partial.safetensors", found)
        saved = time.monotonic()
  found.pop("done_n")
  return found


def global_scores(ws: TagWorkspace) -> np.ndarray:
  """CLIP's own probabilities `[n, f]` of the whole pictures, over labels and background."""
  encoder, images = cdm.Encoder(ws.clip, ws.model_paths["clip"]), ws.dataset.test.images_nhwc
  rows = []
  with ws.log.progress(len(images), "whole pictures") as bar:
    for features_bf in cdm.streamed(encoder, BATCH)(images):
      rows.append(features_bf[:, encoder.width:])
      bar.update(len(features_bf))
  logits_nk = np.exp(np.asarray(ws.clip.logit_scale[...], np.float32)) * np.concatenate(rows) @ ws.texts_kp.T
  return metrics.softmax(logits_nk)[:, :len(ws.names)].astype(np.float32)
