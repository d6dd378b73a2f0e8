"""Measures a trained CLIP-Decoder on the test images and writes `results.json`.

Metrics follow `multilabel_metrics.py`; in the file they are in percent. Zero-shot (ZSL) ranks unseen labels alone,
generalised (GZSL) all labels, "seen" the labels of training. Baselines: the last weights in place of their average,
CLIP's own softmax over the same labels, and random scores.

Leaves `scores.safetensors`: logits `[n, k]` of the averaged weights.

Shapes: n test image, k label, d embedding.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, files, logs, metrics, multilabel_metrics, processes
from digzsl_jax.base_workspace import BATCH, check
from digzsl_jax.decoder_workspace import DecoderWorkspace
from digzsl_jax.models import cdm, clip_decoder
from digzsl_jax.multilabel_metrics import percent

NEEDS = ("train",)
MODELS = ("clip", "queries", "tresnet")
OURS, RAW, CLIP, RANDOM = "clip_decoder", "last_weights", "clip_zero_shot", "random_scores"


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is counted.

  Attributes:
    top: numbers of tags an image is given, for P, R and F1.
    drop_empty: leaves out images without a label of the list that is ranked, as ML-Decoder does; BiAM keeps them.
    skip_absent: leaves labels without a test image out of mAP; else they count 0, as published.
  """

  top: tuple[int, ...]
  drop_empty: bool
  skip_absent: bool

  def __post_init__(self):
    check(bool(self.top) and min(self.top) >= 1, "top", self.top, "numbers of at least 1")


def parts(ws: DecoderWorkspace) -> dict[str, list[int]]:
  """The lists of labels that are ranked, as columns; a decoder of a closed list knows seen labels alone."""
  seen, unseen = list(ws.dataset.seen), list(ws.dataset.unseen)
  if ws.closed or not unseen:
    return {"seen": seen}
  return {"zsl": unseen, "gzsl": [*seen, *unseen], "seen": seen}


def validate(settings: Settings, ws: DecoderWorkspace) -> None:
  """Raises ValueError if no test image holds a label of a list: nothing could be ranked right."""
  for part, columns in parts(ws).items():
    if not (ws.dataset.test.targets_nk[:, columns] == 1).any():
      raise ValueError(f"no test image of {ws.dataset.name} holds one of the {len(columns)} labels that {part!r} "
                       "ranks; give config.data test images that do, or leave this stage out")


def measure(settings: Settings, scores_nk: np.ndarray, targets_nk: np.ndarray, names: Sequence[str]) -> dict:
  """What `results.json` says of one method and list; NaN scores or no positives at all raise ValueError."""
  if settings.drop_empty:
    rows = (targets_nk == 1).any(1)
    scores_nk, targets_nk = scores_nk[rows], targets_nk[rows]
  precisions_k = multilabel_metrics.average_precisions(scores_nk, targets_nk)
  found = {"mAP": percent(multilabel_metrics.mean_average_precision(precisions_k, skip_absent=settings.skip_absent))}
  for top in settings.top:
    if top <= len(names):
      ratios = multilabel_metrics.precision_recall_f1(scores_nk, targets_nk, top)
      found |= {f"{letter}@{top}": percent(ratio) for letter, ratio in zip(("P", "R", "F1"), ratios)}
  return found | {"images": len(scores_nk), "labels": len(names), "per_label": {
      name: percent(precision) for name, precision in zip(names, precisions_k)}}


def decoder_scores(ws: DecoderWorkspace, model: clip_decoder.CLIPDecoder, queries_kw: np.ndarray | None,
                   name: str) -> np.ndarray:
  """Logits `[n, k]` of the test images."""
  images, rows = ws.dataset.test.images_nhwc, []
  stream = (cdm.streamed(clip_decoder.Scorer(model, queries_kw), BATCH) if ws.dataset.has_images
            else functools.partial(clip_decoder.score_tokens, model, queries_kw))
  with ws.log.progress(len(images), f"score, {name}") as bar:
    for scores_bk in stream(images):
      rows.append(scores_bk)
      bar.update(len(scores_bk))
  return np.concatenate(rows)


def clip_scores(ws: DecoderWorkspace) -> np.ndarray:
  """Cosines of the test images with all labels, times CLIP's scale."""
  encoder = cdm.Encoder(ws.clip, ws.model_paths["clip"])
  rows = np.concatenate(list(cdm.streamed(encoder, BATCH)(ws.dataset.test.images_nhwc)))
  return np.exp(ws.clip.logit_scale[...]) * rows[:, encoder.width:] @ ws.label_texts_kd.T


def trained(ws: DecoderWorkspace) -> dict[str, clip_decoder.CLIPDecoder]:
  """The decoder with averaged and with last weights."""
  model = ws.new_decoder()
  graphdef, params, statistics, frozen = nnx.split(model, ws.trained, nnx.BatchStat, ...)
  path = ws.folder("train") / "weights.safetensors"
  like = {name: (params, statistics) for name in ("raw", "average")}
  if (weights := checkpoint.load_state(path, like)) is None:
    raise ValueError(f"{path} is missing; delete {path.parent} and train anew")
  typed = jax.tree.map(lambda x, own: x.astype(own.dtype), weights, like)  # they are kept in float32
  return {name: nnx.merge(graphdef, *typed[key], frozen) for name, key in ((OURS, "average"), (RAW, "raw"))}


def all_scores(ws: DecoderWorkspace) -> dict[str, np.ndarray]:
  """By method, `[n, k]` of all labels (of the seen ones, where the decoder knows no others)."""
  queries_kw = None if ws.closed else ws.query_vectors_kw
  found = {name: decoder_scores(ws, model, queries_kw, name) for name, model in trained(ws).items()}
  shape = (len(ws.dataset.test.targets_nk), len(ws.dataset.names))
  if ws.closed:
    spread = {name: np.full(shape, np.nan, np.float32) for name in found}
    for name, scores_nk in found.items():
      spread[name][:, list(ws.dataset.seen)] = scores_nk
    found = spread
  clip = {CLIP: clip_scores(ws)} if ws.dataset.has_images else {}
  return found | clip | {RANDOM: np.random.default_rng(ws.seed).random(shape)}


def complete(ws: DecoderWorkspace, folder: pathlib.Path) -> bool:
  """Whether `results.json` is there; it lies outside the stage's folder."""
  return (ws.workdir / "results.json").exists()


def run(settings: Settings, ws: DecoderWorkspace, folder: pathlib.Path) -> dict:
  """Writes `results.json` in the work folder; returns its headline numbers."""
  if not processes.is_first():
    return {}
  dataset, scores = ws.dataset, all_scores(ws)
  checkpoint.write_arrays(folder / "scores.safetensors", {OURS: scores[OURS]})
  measured: dict[str, dict] = {}
  for part, columns in parts(ws).items():
    names, targets_nk = [dataset.names[k] for k in columns], dataset.test.targets_nk[:, columns]
    for method, scores_nk in scores.items():
      ranked_nk = metrics.softmax(scores_nk[:, columns]) if method == CLIP else scores_nk[:, columns]
      measured.setdefault(method, {})[part] = measure(settings, ranked_nk, targets_nk, names)
  results = measured.pop(OURS) | {
      "method": OURS, "dataset": dataset.name, "seed": ws.seed,
      "labels": {"seen": len(dataset.seen), "unseen": len(dataset.unseen)},
      "images": {part: len(getattr(dataset, part).targets_nk) for part in ("train", "test")},
      "warnings": ws.warnings, "baselines": measured, "training": ws.stages["train"].results(),
      "devices": logs.devices(ws.mesh.devices.flat),
      "seconds": {name: stage.results()["seconds"] for name, stage in ws.stages.items() if stage.done}}
  files.write_json(ws.workdir / "results.json", results)
  headline = {f"{part}_{key}": value for part in parts(ws) for key, value in results[part].items()
              if key == "mAP" or key.startswith("F1")}
  ws.log.say(f"evaluate: {headline}")
  return headline
