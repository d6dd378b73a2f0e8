"""Measures the classifiers and the generated images, and writes `results.json`, with what stage quality measured.

Accuracies follow `metrics.py`; in the file they are in percent. Whatever must be chosen (lambda) is chosen
on the validation task, whose unseen classes are seen classes of the data set; what is chosen on test
data says so ("oracle").

Shapes: n test image (seen classes' first), k class (seen, then unseen), u unseen class, m generated image
of a class, f feature row, p width of prototypes, d of the text space, h w pixel, c colour, l value of lambda.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from digzsl_jax import checkpoint, files, logs, losses, metrics, processes
from digzsl_jax.base_workspace import EMBEDDED, check
from digzsl_jax.data import generated, splits
from digzsl_jax.models import cdm, hub, judge
from digzsl_jax.models.classifier import Classifier
from digzsl_jax.workspace import Workspace

NEEDS = ("cdm", "generate", "classifier", "quality")
MODELS = ("clip", "encoder", "judge")
# By source of unseen images; the first that there is heads `results.json`, the others are its baselines.
METHODS = {"learned": "dig_zsl", "plain": "plain_sd", "gaussian": "gaussian_features", "real": "real_images"}
CHOSEN, ORACLE = "validation classes", "test (oracle)"


@dataclasses.dataclass(frozen=True)
class Settings:
  """How lambda is chosen.

  Attributes:
    lambdas: how many values, evenly from 0 to 1, both included.
  """

  lambdas: int

  def __post_init__(self):
    check(self.lambdas >= 2, "lambdas", self.lambdas, "at least 2")

  @property
  def lambda_l(self) -> np.ndarray:
    return np.linspace(0, 1, self.lambdas).round(6)


def percent(fraction: float) -> float:
  """A fraction in percent, to two decimals."""
  return round(100 * float(fraction), 2)


class Scores(NamedTuple):
  """The test images of a task and the probabilities that each method gives them."""

  labels_n: np.ndarray  # columns of the probabilities
  is_seen_k: np.ndarray
  names_k: list[str]
  probabilities_nk: dict[str, np.ndarray]  # by method

  def curve(self, method: str, lambda_l: np.ndarray) -> metrics.Curve:
    """U, S and H of a method for every lambda, as fractions."""
    return metrics.lambda_curve(self.probabilities_nk[method], self.labels_n, self.is_seen_k, lambda_l,
                                self.names_k)


def test_features(real: Mapping[str, np.ndarray], task: str) -> np.ndarray:
  """Feature rows `[n, f]` of the test images of `task`, those of seen classes first."""
  return np.concatenate([real[f"{task}.test_seen"], real[f"{task}.test_unseen"]])


def clip_embeds(ws: Workspace, task: splits.Task, features_nf: np.ndarray) -> np.ndarray:
  """Feature rows that end with the run's own CLIP embedding: `features_nf`, unless these are of another encoder."""
  if not ws.dataset.has_images or ws.config["cdm"]["encoder"] == cdm.CLIP:
    return features_nf
  encode = ws.extractor("clip")
  return np.concatenate([encode(labelled.images_nhwc) for labelled in (task.test_seen, task.test_unseen)])


def read_scores(ws: Workspace, task: splits.Task, features_nf: np.ndarray, embeds_nd: np.ndarray) -> Scores:
  """Probabilities of the baselines without images (CLIP, CDM) and of the classifiers.

  Args:
    features_nf: of the test images.
    embeds_nd: of the same, what `clip_embeds` found.
  """
  classes = (*task.seen, *task.unseen)
  names = [ws.dataset.names[label] for label in classes]
  labels_n = task.positions(np.concatenate([task.test_seen.labels_n, task.test_unseen.labels_n]))
  prototypes_kp, found = ws.prototypes_kd[list(classes)], {}
  if ws.dataset.has_images:
    texts_kd = ws.text_prototypes_kd[list(classes)]
    logits_nk = jnp.exp(ws.clip.logit_scale[...]) * embeds_nd[:, -texts_kd.shape[1]:] @ texts_kd.T
    found["clip_zero_shot"] = metrics.softmax(logits_nk)
  for kind in cdm.KINDS:
    folder = ws.folder("cdm") / f"{task.name}_{kind}"
    if folder.exists():  # only the run's own CLIP has a residual head
      embeds = losses.normalise(cdm.load_head(folder)(features_nf))
      found[f"cdm_prototype_{kind}"] = metrics.softmax(embeds @ prototypes_kp.T / ws.config["cdm"]["temperature"])
  found["cdm_prototype"] = found[f"cdm_prototype_{ws.config['cdm']['kind']}"]
  for source, method in METHODS.items():
    folder = ws.folder("classifier") / f"{task.name}_{source}"
    if folder.exists():  # not every data set has real images of unseen classes
      found[method] = metrics.softmax(hub.load(Classifier, folder)(features_nf))
  return Scores(labels_n, np.arange(len(classes)) < len(task.seen), names, found)


def points(curve: metrics.Curve) -> list[dict[str, float]]:
  """A curve as `results.json` holds it, in percent."""
  return [{"lambda": float(lam), "U": percent(unseen), "S": percent(seen), "H": percent(harmonic)}
          for lam, unseen, seen, harmonic in zip(*curve)]


def conventional(scores: Scores, method: str) -> dict:
  """T1: unseen test images, unseen classes alone."""
  unseen, (labels_n, is_seen_k, names_k, found) = np.flatnonzero(~scores.is_seen_k), scores
  rows_n = ~is_seen_k[labels_n]
  said_n = metrics.restricted_predictions(found[method][rows_n], unseen)
  t1_u = metrics.class_accuracies(said_n, labels_n[rows_n], unseen, names_k)
  return {"T1": percent(t1_u.mean()),
          "T1_per_image": percent(metrics.per_image_accuracy(said_n, labels_n[rows_n])),
          "per_class": {names_k[k]: percent(t1) for k, t1 in zip(unseen, t1_u)}}


def generalised(scores: Scores, method: str, lam: float, chosen_on: str) -> dict:
  """U, S, H: all test images, all classes."""
  labels_n, is_seen_k, names_k, found = scores
  said_n = metrics.calibrated_predictions(found[method], is_seen_k, lam)
  all_k = metrics.class_accuracies(said_n, labels_n, range(len(names_k)), names_k)
  unseen, seen = all_k[~is_seen_k].mean(), all_k[is_seen_k].mean()
  rows_n = is_seen_k[labels_n]
  by_image = [metrics.per_image_accuracy(said_n[rows], labels_n[rows]) for rows in (~rows_n, rows_n)]
  per_image = dict(zip("USH", map(percent, (*by_image, metrics.harmonic_mean(*by_image)))))
  return {"U": percent(unseen), "S": percent(seen), "H": percent(metrics.harmonic_mean(unseen, seen)),
          "per_image": per_image, "lambda": lam, "lambda_chosen_on": chosen_on,
          "per_class": {name: percent(share) for name, share in zip(names_k, all_k)}}


def measure(scores: Scores, lambdas: Mapping[str, float], oracle: Mapping[str, float] | None = None) -> dict:
  """What `results.json` says of one task's accuracies; `lambdas` and `oracle` by method."""
  entries = {}
  for method in scores.probabilities_nk:
    entries[method] = {"czsl": conventional(scores, method),
                       "gzsl": generalised(scores, method, lambdas[method], CHOSEN)}
    if oracle:
      entries[method]["gzsl_oracle"] = generalised(scores, method, oracle[method], ORACLE)
  t1 = {source: entries[method]["czsl"]["T1"] for source, method in METHODS.items() if method in entries}
  closed = metrics.gap_closed(t1["learned"], t1["plain"], t1["real"]) if t1.keys() >= {"learned", "real"} else None
  head = METHODS[next(iter(t1))]
  return entries.pop(head) | {"method": head, "baselines": entries,
                              "gap_closed": None if closed is None else round(closed, 4)}


def images_curve(ws: Workspace, scores: Scores, real: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, float]]]:
  """T1 on the test task against the number of generated images of a class, by source.

  Args:
    real: feature rows of stage cdm.
  """
  features_nf, curves = test_features(real, "test"), {}
  for source in ("learned", "plain"):
    folders = [path for path in ws.folder("classifier").glob(f"test_{source}*") if path.is_dir()]
    found = {hub.read_json(path / "config.json")["images"]: metrics.softmax(hub.load(Classifier, path)(features_nf))
             for path in folders}
    t1 = {count: conventional(scores._replace(probabilities_nk=found), count)["T1"] for count in sorted(found)}
    curves[source] = [{"images": count, "T1": value} for count, value in t1.items()]
  return curves


def judge_hits(ws: Workspace, folder: pathlib.Path, manifest: dict, source: str,
               names: Sequence[str]) -> dict[str, np.ndarray]:
  """Share of each class's images in which the judge sees that class, exactly and up to mixed-up words."""
  model, config = ws.judge
  images_nhwc = generated.Images.of(folder, manifest, source, names)[:]
  images_umhwc = images_nhwc.reshape(len(names), -1, *images_nhwc.shape[1:])
  found = judge.agreement(model, config, names, images_umhwc)
  return {"judge_agreement": found["exact"].mean(1), "judge_pair_agreement": found["pair"].mean(1)}


def agreement(ws: Workspace, task: splits.Task, made: Mapping[str, np.ndarray]) -> dict:
  """How often the CDM and the judge recognise the class of a generated image.

  Args:
    made: feature rows `[u, m, f]` of stage classifier.

  Returns:
    percentages for "learned" and, under `plain_sd_*`, "plain"; "per_class" holds the same by name.
  """
  names = [ws.dataset.names[label] for label in task.unseen]
  folder = ws.folder("generate") / task.name
  manifest = generated.read_manifest(folder, names)
  head = cdm.load_head(ws.cdm_head(task.name))
  prototypes_up = ws.prototypes_kd[list(task.unseen)]
  found = {}
  for source, prefix in (("learned", ""), ("plain", "plain_sd_")):
    rows_umf = made[f"{task.name}.{source}"]
    cosines = losses.normalise(head(rows_umf.reshape(-1, rows_umf.shape[-1]))) @ prototypes_up.T
    said_um = np.argmax(cosines, -1).reshape(rows_umf.shape[:2])
    hits = {"cdm_agreement": (said_um == np.arange(len(names))[:, None]).mean(1)}
    if ws.judge is not None:
      hits |= judge_hits(ws, folder, manifest, source, names)
    found |= {prefix + key: share_u for key, share_u in hits.items()}
  per_class = {name: {key: percent(share_u[row]) for key, share_u in found.items()}
               for row, name in enumerate(names)}
  return {key: percent(share_u.mean()) for key, share_u in found.items()} | {"per_class": per_class}


def counts(ws: Workspace) -> dict[str, int]:
  """Images, or rows of features, of each part of the data set, and how many are made of each unseen class."""
  found = {part: len(getattr(ws.dataset, part).labels_n) for part in ("train", "test_seen", "test_unseen")}
  return found | ({"generated_per_class": ws.config["generate"]["images"]} if ws.dataset.has_images else {})


def warnings(ws: Workspace) -> list[str]:
  """What makes the numbers of this run mean less than they seem to."""
  foreign = sorted(name for name in ws.model_names.values()
                   if name.startswith(EMBEDDED) and name[len(EMBEDDED):].split("/")[0] != ws.config["data"]["name"])
  if not foreign:
    return []
  return [f"{', '.join(foreign)} learnt from another small world and know nothing of these classes: accuracies, "
          "agreements and distances below mean nothing. What a run with them shows is that data, counts, averages and "
          "stages fit together."]


def validate(settings: Settings, ws: Workspace) -> None:
  """Raises ValueError for classes that the judge does not know."""
  for task in ws.tasks.values() if ws.judge_config else ():
    for label in task.unseen:
      judge.targets(ws.judge_config, ws.dataset.names[label])


def complete(ws: Workspace, folder: pathlib.Path) -> bool:
  """Whether `results.json` is there; it lies outside the stage's folder."""
  return (ws.workdir / "results.json").exists()


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict:
  """Writes `results.json` in the work folder; returns its headline numbers."""
  real = checkpoint.read_arrays(ws.folder("cdm") / "features.safetensors")
  features = {name: test_features(real, name) for name in ws.tasks}
  embeds = {name: clip_embeds(ws, task, features[name]) for name, task in ws.tasks.items()}
  if not processes.is_first():
    return {}
  scores = {name: read_scores(ws, task, features[name], embeds[name]) for name, task in ws.tasks.items()}
  curves = {name: {method: found.curve(method, settings.lambda_l) for method in found.probabilities_nk}
            for name, found in scores.items()}
  best = {name: {method: metrics.choose_lambda(curve) for method, curve in found.items()}
          for name, found in curves.items()}
  measured = {"test": measure(scores["test"], best["validation"], best["test"]),
              "validation": measure(scores["validation"], best["validation"])}
  sources = [source for source in METHODS if METHODS[source] in curves["test"] and source != "real"]
  if ws.dataset.has_images:
    made = checkpoint.read_arrays(ws.folder("classifier") / "features.safetensors")
    for name, task in ws.tasks.items():
      measured[name]["generated"] = agreement(ws, task, made)
    measured["test"]["images_curve"] = images_curve(ws, scores["test"], real)
    measured["test"]["quality"] = {key: value for key, value in ws.stages["quality"].results().items()
                                   if key != "seconds"}
  results = measured["test"] | {
      "dataset": ws.dataset.name, "classes": {"seen": len(ws.dataset.seen), "unseen": len(ws.dataset.unseen)},
      "images": counts(ws), "warnings": warnings(ws), "seed": ws.seed, "validation": measured["validation"],
      "devices": logs.devices(ws.mesh.devices.flat),
      "lambda_curve": {source: points(curves["test"][METHODS[source]]) for source in sources},
      "seconds": {name: stage.results()["seconds"] for name, stage in ws.stages.items()
                  if stage.done}}
  files.write_json(ws.workdir / "results.json", results)
  headline = {key: results["czsl"][key] for key in ("T1", "T1_per_image")}
  headline |= {key: results["gzsl"][key] for key in ("U", "S", "H", "lambda")}
  headline |= {f"{name}_T1": entry["czsl"]["T1"] for name, entry in results["baselines"].items()
               if name == METHODS["plain"]}
  headline["gap_closed"] = results["gap_closed"]
  ws.log.say(f"evaluate: {headline}")
  return headline
