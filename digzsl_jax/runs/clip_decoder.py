"""Trains CLIP-Decoder (arXiv 2406.14830): ML-Decoder's head on an image encoder, asked by embeddings of seen labels.

The loss is `alpha L_clip + beta L_asl`: the asymmetric loss of the seen labels, summed over batch and labels, and the
CLIP loss between images and their captions, a mean over the batch. Nothing of an unseen label is read: targets,
captions and queries are those of seen ones.

Adam under the one-cycle policy; an average of all weights, those of batch norms included, follows every update. An
update depends on settings and its number alone, so a resumed run repeats it bit for bit. On several devices a batch
is divided among them; batch norms see all of it.

An encoder that is neither trained nor shown augmented pictures gives the same tokens every time: they are made once if
they fit into memory.

Leaves `weights.safetensors`: what was trained, under `raw` and `average`.

Shapes: n training image, m image of the data set, b image of a batch, t token, e channel of the encoder, k seen label,
w width of a query, x width of a caption's embedding.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from digzsl_jax import batches, checkpoint, losses, mesh, optimisers
from digzsl_jax.base_workspace import BATCH, check
from digzsl_jax.data import augment, multilabel
from digzsl_jax.decoder_workspace import CLIP, FEATURES, DecoderWorkspace
from digzsl_jax.models import cdm, clip_decoder, tresnet
from digzsl_jax.models.clip_decoder import CLIPDecoder

NEEDS = ()
MODELS = ("clip", "queries", "tresnet")
ENCODERS = (CLIP, FEATURES, *tresnet.VARIANTS)
IN_MEMORY = 2**31  # bytes that tokens of a frozen encoder may take
SAVE_EVERY, LOG_EVERY = 500, 50  # updates
SAVE_SECONDS = 300  # or earlier, where updates are slow; several processes have no common clock


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is trained, and how.

  Attributes:
    encoder: "clip", the run's own vision tower, a TResNet: "M", "L", "XL", or "features" for data that have these.
    train_encoder: whether it is trained too.
    groups: 0 for the zero-shot decoder; else queries of a decoder of the seen labels alone, each for a group of them.
    width, heads, feed_forward, dropout: of the decoder.
    shared: width of the space of images and captions.
    alpha, beta: weights of the CLIP loss and of the asymmetric loss.
    temperature: t to begin with; logits of the CLIP loss are exp(t) times a cosine.
    gamma_negative, gamma_positive, margin: of the asymmetric loss.
    caption: what a caption begins with.
    drop_empty: leaves out images without a seen label, as ML-Decoder does on NUS-WIDE; BiAM keeps them.
    labels: seen labels of an update, those of its images first, the others drawn; 0 for all.
    augment: Cutout and RandAugment.
    epochs, batch: passes over the data, images of an update.
    learning_rate: at the peak of the cycle.
    weight_decay: of matrices; `coupled` adds it to the gradient (Adam), else it is AdamW's.
    average: decay of the average of weights.
  """

  encoder: str
  train_encoder: bool
  groups: int
  width: int
  heads: int
  feed_forward: int
  dropout: float
  shared: int
  alpha: float
  beta: float
  temperature: float
  gamma_negative: float
  gamma_positive: float
  margin: float
  caption: str
  drop_empty: bool
  labels: int
  augment: bool
  epochs: int
  batch: int
  learning_rate: float
  weight_decay: float
  coupled: bool
  average: float

  def __post_init__(self):
    check(self.encoder in ENCODERS, "encoder", self.encoder, f"one of {ENCODERS}")
    for field in ("width", "heads", "feed_forward", "shared", "epochs", "batch"):
      check(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
    check(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width {self.width}")
    for field in ("dropout", "average"):
      check(0 <= getattr(self, field) < 1, field, getattr(self, field), "at least 0 and below 1")
    for field in ("groups", "labels", "alpha", "beta", "gamma_negative", "gamma_positive", "weight_decay"):
      check(getattr(self, field) >= 0, field, getattr(self, field), "at least 0")
    check(self.alpha + self.beta > 0, "beta", self.beta, "above 0 where alpha is 0")
    check(0 <= self.margin < 1, "margin", self.margin, "at least 0 and below 1")
    check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
    check(not (self.groups and self.labels), "labels", self.labels,
          "0 with groups: a decoder of a closed list has no queries to choose from")


class State(NamedTuple):
  """What an update changes and a checkpoint holds; averages are of weights and of batch norms' statistics."""

  step: jax.Array
  params: nnx.State
  statistics: nnx.State
  average: tuple[nnx.State, nnx.State]
  optimiser: optax.OptState


class Batch(NamedTuple):
  """What an update sees."""

  images: Any  # uint8 [b, i, j, c], or tokens [b, t, e]
  targets: Any  # int8 [b, k]
  captions: Any  # [b, x], zeros for an image without labels


class Trainer:
  """The compiled update of a decoder, and the state that it starts from.

  Weights are float32 whatever the computation's type: an update is smaller than what bfloat16 tells apart.
  """

  def __init__(self, settings: Settings, model: CLIPDecoder, steps: int, ws: DecoderWorkspace):
    self.settings, self.seed, self.devices = settings, ws.seed, ws.mesh
    self.graphdef, params, self.statistics, self.frozen = nnx.split(model, ws.trained, nnx.BatchStat, ...)
    self.types = jax.tree.map(lambda x: x.dtype, params)
    self.params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    self.optimiser = optimisers.adam(steps, settings.learning_rate, settings.weight_decay, settings.coupled)
    self.update = jax.jit(self._update, donate_argnums=0)

  def start(self) -> State:
    copy = functools.partial(jax.tree.map, jnp.copy)
    state = State(jnp.int32(0), copy(self.params), copy(self.statistics), (copy(self.params), copy(self.statistics)),
                  self.optimiser.init(self.params))
    return mesh.place(state, mesh.replicated(self.devices))

  def _loss(self, params, statistics, frozen, batch: Batch, queries_kw, key) -> tuple[jax.Array, tuple]:
    params = jax.tree.map(lambda x, kind: x.astype(kind), params, self.types)
    settings, model = self.settings, nnx.merge(self.graphdef, params, statistics, frozen)
    tokens_bte = model.tokens(batch.images, train=settings.train_encoder)
    logits_bk, images_bp, captions_bp = model(tokens_bte, queries_kw, batch.captions, key)
    asl = losses.asymmetric(logits_bk, batch.targets, gamma_negative=settings.gamma_negative,
                            gamma_positive=settings.gamma_positive, margin=settings.margin)
    clip, accuracy = losses.clip(images_bp, captions_bp, jnp.exp(model.temperature[...]),
                                 counted_b=jnp.any(batch.captions != 0, axis=-1))
    found = {"loss": settings.alpha * clip + settings.beta * asl, "asl": asl, "clip": clip, "clip_accuracy": accuracy}
    return found["loss"], (nnx.state(model, nnx.BatchStat), found)

  def _update(self, state: State, frozen: nnx.State, batch: Batch, queries_kw) -> tuple[State, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)
    grads, (statistics, found) = jax.grad(self._loss, has_aux=True)(state.params, state.statistics, frozen, batch,
                                                                    queries_kw, key)
    updates, optimiser = self.optimiser.update(grads, state.optimiser, state.params)
    params, keep = optax.apply_updates(state.params, updates), self.settings.average
    average = jax.tree.map(lambda a, new: keep * a + (1 - keep) * new, state.average, (params, statistics))
    return State(state.step + 1, params, statistics, average, optimiser), found


class Data(NamedTuple):
  """The training set, and how an update's part of it is made."""

  images: Any  # uint8 [m, i, j, c] or files of them, or tokens [m, t, e]
  places_n: np.ndarray  # which of them are trained on: large arrays on disk stay there
  targets_nk: np.ndarray
  captions_nx: np.ndarray
  queries_kw: np.ndarray | None
  make_views: bool

  def batch(self, settings: Settings, seed: int, step: int) -> tuple[Batch, np.ndarray | None]:
    """This process's part of the batch of an update, and the queries that it asks."""
    rows_b = batches.rows(len(self.targets_nk), settings.batch, seed, step)
    columns = self.columns(settings.labels, self.targets_nk[rows_b], (seed, step))
    mine_b = batches.mine(rows_b)
    images = np.asarray(self.images[self.places_n[mine_b]])
    if images.dtype.kind == "f":
      images = images.astype(np.float32, copy=False)
    if self.make_views:
      images = augment.augment_batch(images, [(seed, step, row) for row in mine_b.tolist()])
    queries_kw = self.queries_kw if columns is None or self.queries_kw is None else self.queries_kw[columns]
    targets_bk = self.targets_nk[mine_b] if columns is None else self.targets_nk[np.ix_(mine_b, columns)]
    return Batch(images, targets_bk, self.captions_nx[mine_b]), queries_kw

  def columns(self, count: int, targets_bk: np.ndarray, seed: tuple[int, int]) -> np.ndarray | None:
    """The labels of an update: those that its images hold, then others, each group in random order; None for all."""
    if not 0 < count < targets_bk.shape[1]:
      return None
    draw_k = np.random.default_rng(seed).random(targets_bk.shape[1])
    return np.sort(np.argsort(draw_k - (targets_bk == 1).any(0))[:count])


def token_shape(settings: Settings, model: CLIPDecoder, images) -> tuple[int, ...] | None:
  """`[n, t, e]` of the tokens of all images, if they are the same every time and fit into memory."""
  if settings.train_encoder or settings.augment or model.encoder is None:
    return None
  one = jax.eval_shape(model.tokens, jax.ShapeDtypeStruct((1, *images.shape[1:]), np.uint8))
  shape = (len(images), *one.shape[1:])
  return shape if np.prod(shape) * 4 <= IN_MEMORY else None


def make_tokens(model: CLIPDecoder, images, shape: tuple[int, ...], ws: DecoderWorkspace) -> np.ndarray:
  """Tokens of all images, `shape`, float32."""
  tokens_nr, done = np.empty((shape[0], np.prod(shape[1:])), np.float32), 0
  with ws.log.progress(shape[0], "tokens") as bar:
    for rows_br in cdm.streamed(clip_decoder.FlatTokens(model.encoder), BATCH)(images):
      tokens_nr[done:done + len(rows_br)] = rows_br
      done += len(rows_br)
      bar.update(len(rows_br))
  return tokens_nr.reshape(shape)


def prepare(settings: Settings, ws: DecoderWorkspace, model: CLIPDecoder) -> Data:
  """Images or their tokens, targets and captions of what is trained on."""
  dataset, seen = ws.dataset, list(ws.dataset.seen)
  images, places_n = dataset.train.images_nhwc, np.arange(len(dataset.seen_targets()))
  if settings.drop_empty:
    places_n = multilabel.with_any(dataset.train, seen)
  if len(places_n) < settings.batch:
    raise ValueError(f"config.train.batch is {settings.batch}, but only {len(places_n)} training images hold a seen "
                     "label; lower it")
  targets_nk = dataset.seen_targets()[places_n]
  captions_nx = ws.caption_embeds(targets_nk, [dataset.names[k] for k in seen], settings.caption)
  if shape := token_shape(settings, model, images):
    images = make_tokens(model, images, shape, ws)
  queries_kw = None if ws.closed else ws.query_vectors_kw[seen]
  return Data(images, places_n, targets_nk, captions_nx, queries_kw, settings.augment)


def validate(settings: Settings, ws: DecoderWorkspace) -> None:
  """Raises ValueError for what would fail only after the data was prepared."""
  if settings.batch % ws.mesh.size:
    raise ValueError(f"batch is {settings.batch}, which {ws.mesh.size} devices cannot share evenly; use a multiple of "
                     "their number")
  if len(ws.dataset.seen_targets()) < settings.batch:
    raise ValueError(f"batch is {settings.batch}, but there are {len(ws.dataset.train.targets_nk)} training images")
  if ws.dataset.has_images == (settings.encoder == FEATURES):
    has = "images" if ws.dataset.has_images else 'features, which only encoder "features" takes'
    raise ValueError(f"encoder is {settings.encoder!r}, but {ws.dataset.name} has {has}")
  if settings.encoder == FEATURES and (settings.train_encoder or settings.augment):
    raise ValueError('encoder is "features": there is nothing to augment and no encoder to train; set both to False')
  if settings.encoder in (CLIP, FEATURES) and ws.models.tresnet:
    raise ValueError(f"encoder is {settings.encoder!r}, which does not read config.models.tresnet; empty that, or name "
                     "a TResNet")


def steps_of(settings: Settings, images: int) -> int:
  return settings.epochs * (images // settings.batch)


def lower(settings: Settings, ws: DecoderWorkspace) -> dict[str, jax.stages.Lowered]:
  """The update for `--dry_run`: lowered, not run."""
  dataset, model = ws.dataset, ws.new_decoder()
  trainer = Trainer(settings, model, steps_of(settings, len(dataset.train.targets_nk)), ws)
  rows, one = mesh.by_class(ws.mesh), mesh.replicated(ws.mesh)
  array = lambda shape, kind, place=rows: jax.ShapeDtypeStruct(shape, kind, sharding=place)
  count = min(settings.labels or len(dataset.seen), len(dataset.seen))
  tokens = token_shape(settings, model, dataset.train.images_nhwc)
  kind = np.uint8 if dataset.has_images and not tokens else np.float32
  images = array((settings.batch, *(tokens or dataset.train.images_nhwc.shape)[1:]), kind)
  batch = Batch(images, array((settings.batch, count), np.int8),
                array((settings.batch, ws.clip.text_projection.out_features), np.float32))
  queries = None if ws.closed else array((count, ws.query_vectors_kw.shape[1]), np.float32, one)
  frozen = jax.device_put(trainer.frozen, one)
  return {"update": trainer.update.lower(trainer.start(), frozen, batch, queries)}


def run(settings: Settings, ws: DecoderWorkspace, folder: pathlib.Path) -> dict:
  """Trains to the end, from the state in `folder` if there is one; returns the last losses."""
  model = ws.new_decoder()
  if settings.encoder in tresnet.VARIANTS and not ws.models.tresnet:
    ws.log.warn("config.models.tresnet is empty: TResNet starts from fresh weights, published results from ImageNet's")
  data = prepare(settings, ws, model)
  steps = steps_of(settings, len(data.targets_nk))
  trainer = Trainer(settings, model, steps, ws)
  path, state = folder / "state.safetensors", trainer.start()
  if (kept := checkpoint.resume_state(path, state)) is not None:
    state = mesh.place(kept, mesh.replicated(ws.mesh))
  state, found = train(settings, ws, trainer, data, state, steps, path)
  raw, average = (state.params, state.statistics), state.average
  checkpoint.save_state(folder / "weights.safetensors", {"raw": raw, "average": average})
  return {"updates": steps} | found


def train(settings: Settings, ws: DecoderWorkspace, trainer: Trainer, data: Data, state: State, steps: int,
          path: pathlib.Path) -> tuple[State, dict[str, float]]:
  """The updates that are left; the state is kept in `path` now and then."""
  rows, one, done, found = mesh.by_class(ws.mesh), mesh.replicated(ws.mesh), int(state.step), {}
  frozen, make = mesh.place(trainer.frozen, one), functools.partial(data.batch, settings, ws.seed)
  saved = time.monotonic()
  with ws.log.progress(steps, "train", done) as bar:
    for step, (batch, queries_kw) in enumerate(batches.ahead(make, range(done, steps)), done + 1):
      queries = None if queries_kw is None else mesh.place(queries_kw, one)
      state, measured = trainer.update(state, frozen, batches.place(batch, rows), queries)
      bar.update()
      if step % LOG_EVERY == 0 or step == steps:
        found = {name: round(float(value), 5) for name, value in measured.items()}
        if not np.isfinite(found["loss"]):
          wrong = "" if ws.dataset.has_images else ", or look for what is no number among the features"
          raise ValueError(f"the loss is {found['loss']} after {step} updates; lower config.train.learning_rate{wrong}")
        ws.log.metrics("train", step, **found)
        bar.set_postfix({name: f"{value:.3g}" for name, value in found.items()}, refresh=False)
      late = jax.process_count() == 1 and time.monotonic() - saved > SAVE_SECONDS
      if step % SAVE_EVERY == 0 or step == steps or late:
        checkpoint.save_state(path, state)
        saved = time.monotonic()
  return state, found
