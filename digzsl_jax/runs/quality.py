"""Measures how near the generated images are to real ones: FID, KID and CMMD of `quality.py`.

Compares images of the test task's unseen classes, those of the learnt tokens and those of plain Stable Diffusion, with
the real test images of these classes. It is a measurement like those of `evaluate`: nothing is chosen by it.

Shapes: n real image, m generated image, f feature, k class.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from digzsl_jax import processes, quality
from digzsl_jax.base_workspace import check
from digzsl_jax.data import generated
from digzsl_jax.models import inception
from digzsl_jax.workspace import Workspace

NEEDS = ("generate",)
MODELS = ("clip", "inception")
DIGITS = 5  # significant ones: the size of a distance depends on its features


@dataclasses.dataclass(frozen=True)
class Settings:
  """What FID and KID are measured with; CMMD is by the run's own CLIP.

  Attributes:
    inception: safetensors file of FID's Inception, as `digzsl_jax.convert` writes it; "" for neither FID nor KID.
    resize: how images get to the size of Inception, a key of `inception.RESIZES`.
  """

  inception: str
  resize: str

  def __post_init__(self):
    check(self.resize in inception.RESIZES, "resize", self.resize, f"one of {tuple(inception.RESIZES)}")


def encode(ws: Workspace, model: str, names: Sequence[str], manifest: Mapping) -> dict[str, np.ndarray]:
  """Feature rows that distances are of: "real" test images, and by source those generated, class after class.

  Args:
    model: "inception", or "clip" for unit embeddings.
    names: of the unseen classes.
    manifest: of their generated images.
  """
  extract, folder = ws.extractor(model), ws.folder("generate") / "test"
  found = {"real": extract(ws.tasks["test"].test_unseen.images_nhwc)}
  for source in manifest["files"]:
    found[source] = extract.plain(generated.Images.of(folder, manifest, source, names), f"quality {model} {source}")
  first = ws.clip.vision_model.width if model == "clip" else 0  # after the pooled state
  return {side: rows_nf[:, first:] for side, rows_nf in found.items()}


def rounded(value: float | None) -> float | None:
  return None if value is None else float(f"{value:.{DIGITS}g}")


def overall(real: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]) -> dict[str, float]:
  """`quality.scores` of feature rows by model; of a single image there is CMMD alone."""
  few = min(map(len, (*real.values(), *made.values()))) < 2
  pick = lambda side: {model: rows_nf for model, rows_nf in side.items() if model == "clip" or not few}
  return {metric: rounded(value) for metric, value in quality.scores(pick(real), pick(made)).items()}


def kid(real_nf: np.ndarray, made_mf: np.ndarray) -> float | None:
  """KID, None where a side has a single image."""
  return quality.kernel_distance(real_nf, made_mf).mean if min(len(real_nf), len(made_mf)) > 1 else None


OF_A_CLASS = {"inception": ("kid", kid), "clip": ("cmmd", quality.cmmd)}  # no FID, which wants many images


def by_class(real: Mapping[str, np.ndarray], labels_n: np.ndarray, made: Mapping[str, np.ndarray], labels_m: np.ndarray,
             names_k: Sequence[str]) -> dict[str, dict[str, float | None]]:
  """The distances of `OF_A_CLASS`, by class name."""
  found = {metric: quality.by_class(distance, real[model], labels_n, made[model], labels_m, names_k)
           for model, (metric, distance) in OF_A_CLASS.items() if model in real}
  return {name: {metric: rounded(of_class[name]) for metric, of_class in found.items()} for name in names_k}


def validate(settings: Settings, ws: Workspace) -> None:
  """Raises ValueError for a file of another network, which would else be found after hours of generation."""
  if settings.inception and not ws.stages["quality"].done:
    ws.extractor("inception")


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict:
  """Returns what `results.json` has as `quality`.

  Returns:
    "clip" and, with Inception, "resize": what was measured with; "images": the counts "real" and "generated", the
    latter of each source; by source `fid`, `kid`, `kid_std`, `cmmd`; and "per_class": by name the same counts and, by
    source, `kid` (None of a single image) and `cmmd`.
  """
  task = ws.tasks["test"]
  names = [ws.dataset.names[label] for label in task.unseen]
  manifest = generated.read_manifest(ws.folder("generate") / "test", names)
  labels_n = task.positions(task.test_unseen.labels_n) - len(task.seen)
  labels_m = np.repeat(np.arange(len(names)), manifest["images"])
  models = ("inception", "clip") if settings.inception else ("clip",)
  rows = {model: encode(ws, model, names, manifest) for model in models}
  if not processes.is_first():
    return {}
  real, *made = ({model: rows[model][side] for model in models} for side in ("real", *manifest["files"]))
  found = {"clip": ws.models.clip} | ({"resize": settings.resize} if settings.inception else {})
  found["images"] = {"real": len(labels_n), "generated": len(labels_m)}
  per_class = {name: {"images": {"real": int(count), "generated": manifest["images"]}}
               for name, count in zip(names, np.bincount(labels_n))}
  for source, side in zip(manifest["files"], made):
    found[source] = overall(real, side)
    for name, distances in by_class(real, labels_n, side, labels_m, names).items():
      per_class[name][source] = distances
  ws.log.say(f"quality: {found}")
  return found | {"per_class": per_class}
