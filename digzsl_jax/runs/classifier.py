"""Trains zero-shot classifiers on real images of seen classes and made images of unseen ones.

For each task one classifier for each source of the unseen images: "learned" (class tokens), "plain" (the
name alone, same noise), "gaussian" (no images, but features that are drawn as `gaussians.draw` says) and "real"
(real training images, where the data set has them: the upper bound). They share seen images, initial weights and the
number of unseen images, so only the source differs. A data set that has features in place of images has "gaussian"
alone.

The test task's are also trained with a half, a quarter and an eighth of the generated images, for T1 against N_gen.

Leaves the folders `<task>_<source>`, with fewer images `test_<source>_<images>`, and `features.safetensors`:
rows of all generated images, if there are any, under `<task>.<source>`, `[u, m, f]`. A classifier's `config.json` also
holds what a later user of it needs: "classes", how many of them, the first ones, are "seen", and the "size" of real
images in pixels, null where features stand in place of them.

Shapes: n real seen image, u unseen class, m image of a class, f feature row, k class (seen, then unseen),
s source.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from digzsl_jax import checkpoint, features, gaussians, processes
from digzsl_jax.base_workspace import check
from digzsl_jax.data import generated, splits
from digzsl_jax.logs import Log
from digzsl_jax.models import cdm, hub, platforms
from digzsl_jax.models.classifier import Classifier
from digzsl_jax.workspace import Workspace

NEEDS = ("cdm", "generate")
MODELS = ("clip", "encoder")
FEATURES = ("pooled", "embedding", "all")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the classifiers are trained: full-batch AdamW with cosine decay to zero.

  Attributes:
    features: "pooled" state of the encoder, CLIP's image "embedding", or "all" (both side by side).
    hidden: width of a hidden layer, 0 for a linear classifier.
    images: of each unseen class, at most as many as were generated.
    steps: updates.
  """

  features: str
  hidden: int
  images: int
  steps: int
  learning_rate: float
  weight_decay: float

  def __post_init__(self):
    check(self.features in FEATURES, "features", self.features, f"one of {FEATURES}")
    check(self.hidden >= 0, "hidden", self.hidden, "0 (linear) or more")
    for field in ("images", "steps"):
      check(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
    check(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
    check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")


def encode_generated(stream: Callable, folder: pathlib.Path, names: Sequence[str], log: Log) -> dict[str, np.ndarray]:
  """Feature rows `[u, m, f]` of a task's generated images, by source, classes in the order of `names`.

  `stream` is the encoder, as `cdm.streamed` makes it.
  """
  manifest, found = generated.read_manifest(folder, names), {}
  for source in manifest["files"]:
    encode = functools.partial(features.encode, stream, log, f"encode {folder.name} {source}")
    rows_nf = features.divided(encode, generated.Images.of(folder, manifest, source, names))
    found[source] = rows_nf.reshape(len(names), manifest["images"], -1)
  return found


def real_images(features_nf: np.ndarray, labels_n: np.ndarray, unseen: Sequence[int],
                count: int) -> np.ndarray:
  """`[u, count, f]`: of each class the first `count` rows, repeated from the start where there are fewer."""
  rows_um = np.stack([np.resize(np.flatnonzero(labels_n == label), count) for label in unseen])
  return features_nf[rows_um]


def columns(features: str, width: int, total: int) -> tuple[int, int]:
  """Which columns of a feature row `features` means; `width` is that of the pooled part."""
  if features == "embedding" and total == width:
    raise ValueError('config.classifier.features is "embedding", but the encoder of the CDM has no image '
                     'embedding: use "pooled"')
  return {"pooled": (0, width), "embedding": (width, total), "all": (0, total)}[features]


def compile_training(graphdef: nnx.GraphDef, labels_n: np.ndarray, unseen: int, images: int,
                     settings: Settings) -> Callable:
  """The compiled `(params, rest, seen_nf, unseen_srf) -> (params, last loss)`, one classifier of each source.

  Every class weighs the same. XLA:CPU is quicker with one source after another, accelerators with all at once.
  """
  tx = optax.adamw(optax.cosine_decay_schedule(settings.learning_rate, settings.steps),
                   weight_decay=settings.weight_decay)
  loss_of = optax.softmax_cross_entropy_with_integer_labels
  count_k = np.bincount(labels_n)
  weight_n = 1 / count_k[labels_n]
  unseen_labels_r = np.repeat(np.arange(unseen) + len(count_k), images)

  def train(params, rest, seen_nf, unseen_rf):
    seen_nf, unseen_rf = map(nnx.merge(graphdef, params, rest).standardised, (seen_nf, unseen_rf))

    def objective(params):
      logits = nnx.merge(graphdef, params, rest).logits
      seen = jnp.sum(weight_n * loss_of(logits(seen_nf), labels_n))
      return (seen + jnp.sum(loss_of(logits(unseen_rf), unseen_labels_r)) / images) / (len(count_k) + unseen)

    def update(carry, _):
      params, optimiser = carry
      loss, grads = jax.value_and_grad(objective)(params)
      updates, optimiser = tx.update(grads, optimiser, params)
      return (optax.apply_updates(params, updates), optimiser), loss

    (params, _), loss_t = jax.lax.scan(update, (params, tx.init(params)), length=settings.steps)
    return params, loss_t[-1]

  @jax.jit
  def train_all(params, rest, seen_nf, unseen_srf):
    one = functools.partial(train, params, rest, seen_nf)
    return jax.lax.map(one, unseen_srf) if platforms.platform() == "cpu" else jax.vmap(one)(unseen_srf)

  return train_all


def fit(model: Classifier, seen_nf: np.ndarray, labels_n: np.ndarray, unseen_sumf: np.ndarray,
        settings: Settings) -> tuple[list[Classifier], np.ndarray]:
  """Minimises the cross-entropy; all sources in one compiled call.

  Args:
    labels_n: positions among the seen classes, which are the first columns of the logits.

  Returns:
    `(one classifier of each source, their last losses)`.
  """
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  sources, unseen, images, width = unseen_sumf.shape
  train = compile_training(graphdef, labels_n, unseen, images, settings)
  trained, loss_s = train(params, rest, seen_nf, unseen_sumf.reshape(sources, unseen * images, width))
  one = lambda row: jax.tree.map(lambda leaf: leaf[row], trained)
  return [nnx.merge(graphdef, one(row), rest) for row in range(sources)], np.asarray(loss_s)


def train_task(settings: Settings, task: splits.Task, real: dict[str, np.ndarray],
               made: dict[str, np.ndarray], ws: Workspace, folder: pathlib.Path) -> dict:
  """Trains and writes the classifiers of one task.

  Args:
    real: features of real images, by field of the task.
    made: of generated images, `[u, m, f]` by source.
  """
  labels_n = task.positions(task.train.labels_n)
  seen_kp, unseen_up = ws.prototypes_kd[list(task.seen)], ws.prototypes_kd[list(task.unseen)]
  unseen = {source: rows_umf[:, :settings.images] for source, rows_umf in made.items()}
  unseen["gaussian"] = gaussians.draw(real["train"], labels_n, seen_kp, unseen_up, settings.images, ws.seed)
  if task.real_unseen is not None:
    unseen["real"] = real_images(real["real_unseen"], task.real_unseen.labels_n, task.unseen,
                                 settings.images)
  classes = [ws.dataset.names[label] for label in (*task.seen, *task.unseen)]
  used = columns(settings.features, ws.pooled_width, real["train"].shape[1])
  model = Classifier(used, settings.hidden, len(classes), rngs=nnx.Rngs(ws.seed))
  model.standardise_by(real["train"])
  groups, summary = {settings.images: unseen}, {}
  if made and task.name == "test":
    groups |= fewer_images(made, settings.images)
  for images, group in groups.items():
    models, loss_s = fit(model, real["train"], labels_n, np.stack(list(group.values())), settings)
    for source, trained, loss in zip(group, models, loss_s):
      name = f"{task.name}_{source}" + ("" if images == settings.images else f"_{images}")
      hub.save(trained, folder / name, dtype=np.float32, config={
          "columns": used, "hidden": settings.hidden, "classes": classes, "seen": len(task.seen), "source": source,
          "images": images, "size": task.train.images_nhwc.shape[1] if ws.dataset.has_images else None})
      summary[name] = {"loss": round(float(loss), 4)}
  return summary


def fewer_images(made: dict[str, np.ndarray], images: int) -> dict[int, dict[str, np.ndarray]]:
  """`[u, m, f]` by source: the first half, quarter and eighth of `images`, as far as they are whole numbers."""
  counts = [images // parts for parts in (2, 4, 8) if images % parts == 0]
  return {count: {source: rows_umf[:, :count] for source, rows_umf in made.items()} for count in counts}


def lower(settings: Settings, ws: Workspace) -> dict[str, jax.stages.Lowered]:
  """The training of the test task's classifiers for `--dry_run`: lowered, not run."""
  task = ws.tasks["test"]
  seen_nf = ws.abstract_features(task.train)
  used = columns(settings.features, ws.pooled_width, seen_nf.shape[1])
  model = Classifier(used, settings.hidden, len(task.seen) + len(task.unseen), rngs=nnx.Rngs(ws.seed))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  sources = 1 + 2 * ws.dataset.has_images + (task.real_unseen is not None)
  made_srf = jax.ShapeDtypeStruct((sources, len(task.unseen) * settings.images, seen_nf.shape[1]), np.float32)
  labels_n = task.positions(task.train.labels_n)
  train = compile_training(graphdef, labels_n, len(task.unseen), settings.images, settings)
  return {"all steps": train.lower(params, rest, seen_nf, made_srf)}


def validate(settings: Settings, ws: Workspace) -> None:
  """Raises ValueError if the classifier wants more images than stage generate makes."""
  if ws.dataset.has_images and settings.images > (made := ws.config["generate"]["images"]):
    raise ValueError(f"images is {settings.images}, but config.generate.images is {made}; lower "
                     "the one or raise the other")


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict:
  """Returns the last loss of each classifier."""
  summary, made = {}, {name: {} for name in ws.tasks}
  if ws.dataset.has_images:
    stream = cdm.streamed(ws.cdm_encoder)
    for name, task in ws.tasks.items():
      names = [ws.dataset.names[label] for label in task.unseen]
      made[name] = encode_generated(stream, ws.folder("generate") / name, names, ws.log)
  if not processes.is_first():
    return {}
  real = checkpoint.read_arrays(ws.folder("cdm") / "features.safetensors")
  for name, task in ws.tasks.items():
    of_task = {key.partition(".")[2]: rows_nf for key, rows_nf in real.items() if key.partition(".")[0] == name}
    trained = train_task(settings, task, of_task, made[name], ws, folder)
    summary |= trained
    ws.log.say(f"classifier ({name}): {trained}")
  if ws.dataset.has_images:
    checkpoint.write_arrays(folder / "features.safetensors", {
        f"{name}.{source}": rows_umf for name, found in made.items() for source, rows_umf in found.items()})
  return summary
