"""Trains the category discrimination model on real images of seen classes (arXiv 2412.17219).

Leaves, for each task ("validation", "test") and kind of head, the folder `<task>_<kind>`, and
`features.safetensors`: rows of the frozen encoder for all real images, under `<task>.<field>` with the
fields of `splits.Task`.

Shapes: n image, i j height and width, c colour, f feature row, p width of the text space, k class.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from digzsl_jax import checkpoint, losses, metrics, processes
from digzsl_jax.base_workspace import check
from digzsl_jax.data import splits
from digzsl_jax.data.pictures import Pictures
from digzsl_jax.models import cdm
from digzsl_jax.workspace import Workspace

NEEDS = ()
MODELS = ("clip", "encoder")
FIELDS = ("train", "test_seen", "test_unseen", "real_unseen")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the head is trained: AdamW with cosine decay to zero on cached features.

  Attributes:
    encoder: "clip" for the run's own, or a Hugging Face folder of a ViT, DINOv2, SigLIP or another CLIP; "" for a data
      set that has features in place of images.
    kind: the head that guides class tokens, "residual" ("clip" only) or "mlp"; both are trained where
      the encoder is "clip".
    hidden: width between its two layers.
    temperature: divides the cosines.
    steps: updates.
    batch: images of one update, drawn with replacement.
    cache: folder of feature rows of picture files, which runs share; "" for none.
  """

  encoder: str
  kind: str
  hidden: int
  temperature: float
  steps: int
  batch: int
  learning_rate: float
  weight_decay: float
  cache: str

  def __post_init__(self):
    check(self.kind in self.kinds, "kind", self.kind, f"one of {self.kinds} for encoder {self.encoder!r}")
    for field in ("hidden", "steps", "batch"):
      check(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
    for field in ("temperature", "learning_rate"):
      check(getattr(self, field) > 0, field, getattr(self, field), "positive")
    check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kinds of head that the encoder allows."""
    return cdm.KINDS if self.encoder == cdm.CLIP else ("mlp",)


def encode_task(encode: Callable[[np.ndarray], np.ndarray] | None, task: splits.Task,
                known: dict[bytes, np.ndarray]) -> dict[str, np.ndarray]:
  """Feature rows of all images of a task, by field; images in `known`, and features, are not encoded again.

  The validation task shows the training images of the test task again: `known` (image digest to row)
  is extended here and handed to the next call.
  """
  features = {}
  for field in FIELDS:
    if (chosen := getattr(task, field)) is None:
      continue
    if isinstance(chosen, splits.LabelledFeatures):
      features[f"{task.name}.{field}"] = chosen.features_nf
      continue
    keys = digests(chosen.images_nhwc)
    new = [row for row, key in enumerate(keys) if key not in known]
    if new:
      known.update(zip((keys[row] for row in new), encode(chosen.take(new).images_nhwc)))
    features[f"{task.name}.{field}"] = np.stack([known[key] for key in keys])
  return features


def digests(images_nhwc: np.ndarray | Pictures) -> list[bytes]:
  """What tells an image from others: its bytes, or those of its file."""
  if isinstance(images_nhwc, Pictures):
    return [file.digest for file in images_nhwc.files]
  return [hashlib.sha256(np.ascontiguousarray(image_hwc)).digest() for image_hwc in images_nhwc]


def compile_training(graphdef: nnx.GraphDef, settings: Settings) -> Callable:
  """The compiled `(params, features_nf, labels_n, prototypes_kp, key) -> (params, loss of every step)`."""
  schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
  tx = optax.adamw(schedule, weight_decay=settings.weight_decay)

  def objective(params, features_bf, labels_b, prototypes_kp):
    embeds_bp = nnx.merge(graphdef, params)(features_bf)
    return losses.cosine_cross_entropy(embeds_bp, prototypes_kp, labels_b, settings.temperature)[0].mean()

  def train(params, features_nf, labels_n, prototypes_kp, key):
    def update(carry, step):
      params, optimiser = carry
      rows_b = jax.random.randint(jax.random.fold_in(key, step), (settings.batch,), 0, len(labels_n))
      batch = features_nf[rows_b], labels_n[rows_b]
      loss, grads = jax.value_and_grad(objective)(params, *batch, prototypes_kp)
      updates, optimiser = tx.update(grads, optimiser, params)
      return (optax.apply_updates(params, updates), optimiser), loss
    (params, _), loss_s = jax.lax.scan(update, (params, tx.init(params)), jnp.arange(settings.steps))
    return params, loss_s

  return jax.jit(train)


def fit(head: cdm.Head, features_nf: np.ndarray, labels_n: np.ndarray, prototypes_kp: np.ndarray,
        settings: Settings, seed: int) -> tuple[cdm.Head, np.ndarray]:
  """Minimises the cross-entropy over cosines; the whole training is one compiled call.

  Args:
    labels_n: rows of `prototypes_kp`, which holds the seen classes alone.

  Returns:
    `(head, loss of every step)`.
  """
  graphdef, params = nnx.split(head)
  train = compile_training(graphdef, settings)
  params, loss_s = train(params, features_nf, labels_n, prototypes_kp, jax.random.key(seed))
  return nnx.merge(graphdef, params), np.asarray(loss_s)


def lower(settings: Settings, ws: Workspace) -> dict[str, jax.stages.Lowered]:
  """The training of the test task's head for `--dry_run`: lowered, not run."""
  task, (graphdef, params) = ws.tasks["test"], nnx.split(ws.new_cdm_head())
  features_nf = ws.abstract_features(task.train)
  labels_n = np.zeros(len(features_nf), np.int64)
  train = compile_training(graphdef, settings)
  prototypes_kp = ws.prototypes_kd[list(task.seen)]
  return {"all steps": train.lower(params, features_nf, labels_n, prototypes_kp, jax.random.key(0))}


def kinds(settings: Settings, ws: Workspace) -> tuple[str, ...]:
  """The kinds of head that are trained: only one on CLIP's own embedding can start from it, and only towards texts."""
  return settings.kinds if ws.models.prototypes == "text" else ("mlp",)


def validate(settings: Settings, ws: Workspace) -> None:
  """Raises ValueError for an encoder or a kind of head that the data set or the prototypes do not allow."""
  what = f"images, so it must be {cdm.CLIP!r} or the folder of an encoder" if ws.dataset.has_images else \
      "features in place of images, so it must be ''"
  if ws.dataset.has_images != bool(settings.encoder):
    raise ValueError(f"encoder is {settings.encoder!r}, but {ws.dataset.name} has {what}")
  if settings.kind not in kinds(settings, ws):
    raise ValueError(f'kind is {settings.kind!r}, which corrects CLIP\'s embedding towards texts; with '
                     f'config.models.prototypes={ws.models.prototypes} it must be "mlp"')


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict:
  """Returns the held-out accuracy on seen classes, in percent, and the last loss, by task and kind."""
  encode, features, known = ws.extractor("encoder") if ws.dataset.has_images else None, {}, {}
  for task in ws.tasks.values():
    features |= encode_task(encode, task, known)
  if not processes.is_first():
    return {}
  checkpoint.write_arrays(folder / "features.safetensors", features)
  ws.log.say(f"cdm: features of {len(known) or sum(map(len, features.values()))} images")
  summary = {}
  for name, task in ws.tasks.items():
    seen, prototypes_kp = list(task.seen), ws.prototypes_kd[list(task.seen)]
    train_n, test_n = (task.positions(chosen.labels_n) for chosen in (task.train, task.test_seen))
    for kind in kinds(settings, ws):
      head = cdm.Head(kind, ws.pooled_width, settings.hidden, prototypes_kp.shape[1], rngs=nnx.Rngs(ws.seed))
      head, loss_s = fit(head, features[f"{name}.train"], train_n, prototypes_kp, settings, ws.seed)
      cdm.save_head(head, folder / f"{name}_{kind}")
      for step in range(0, settings.steps, max(1, settings.steps // 10)):
        ws.log.metrics(f"cdm/{name}_{kind}", step + 1, loss=float(loss_s[step]))
      cosines_nk = losses.normalise(head(features[f"{name}.test_seen"])) @ prototypes_kp.T
      names = [ws.dataset.names[label] for label in seen]
      accuracy = metrics.per_class_accuracy(np.argmax(cosines_nk, axis=-1), test_n, range(len(seen)), names)
      found = {"seen_accuracy": round(100 * accuracy, 2), "loss": round(float(loss_s[-1]), 4)}
      summary[f"{name}_{kind}"] = found
      ws.log.say(f"cdm: {name} {kind}: {found}")
  return summary
