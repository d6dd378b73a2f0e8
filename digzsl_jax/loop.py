"""Training by gradient descent: one compiled update, an average of the weights, checkpoints, exact resume."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from digzsl_jax import checkpoint
from digzsl_jax.logs import Log
from digzsl_jax.models import layers

HELD_OUT = 512  # rows at the end of the data that only measure
SAVE_EVERY = 500  # updates between checkpoints


@dataclasses.dataclass(frozen=True)
class Training:
  """AdamW with linear warm-up, cosine decay to zero, gradient clipping at norm 1 and an average of weights."""

  steps: int
  batch: int
  learning_rate: float
  weight_decay: float = 0.01
  average: float = 0.999

  def optimiser(self) -> optax.GradientTransformation:
    """That of the settings; warm-up takes a tenth of the steps, at most 200."""
    rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, min(200, self.steps // 10), self.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay))


class TrainState(NamedTuple):
  """What an update changes and a checkpoint holds."""

  step: jax.Array
  params: nnx.State
  average: nnx.State
  optimiser: optax.OptState


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
  """One training: a model, its loss and the data.

  Attributes:
    name: for the log.
    training: how.
    model: trained from the weights that it has.
    loss: `(model, frozen, batch, key) -> (scalar, metrics)`.
    data: pytree of arrays with a leading row axis; the last `HELD_OUT` rows only measure.
    frozen: arrays handed to `loss` unchanged.
    seed: of everything random.
  """

  name: str
  training: Training
  model: nnx.Module
  loss: Callable
  data: Any
  frozen: Any
  seed: int

  def __post_init__(self):
    if (rows := jax.tree.leaves(self.data)[0].shape[0]) <= HELD_OUT:
      raise ValueError(f"{self.name}: {rows} pictures are too few, {HELD_OUT} of them only measure; raise "
                       "config.corpus.images")

  @functools.cached_property
  def parts(self) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of `model`, and the weights that training starts from."""
    return nnx.split(self.model)

  def start(self) -> TrainState:
    """The state before the first update."""
    params = self.parts[1]
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), self.training.optimiser().init(params))

  def value(self, params: nnx.State, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
    """`loss` as a function of the weights: `(scalar, metrics)`."""
    return self.loss(nnx.merge(self.parts[0], params), frozen, batch, key)

  def step(self, state: TrainState, frozen: Any, data: Any) -> tuple[TrainState, dict]:
    """One update on rows drawn by seed and step, so that a resumed run draws the same: `(state, metrics)`."""
    rows = jax.tree.leaves(data)[0].shape[0] - HELD_OUT
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)
    picks = jax.random.randint(jax.random.fold_in(key, 0), (self.training.batch,), 0, rows)
    batch = jax.tree.map(lambda leaf: leaf[picks], data)
    grads, metrics = jax.grad(self.value, has_aux=True)(state.params, frozen, batch, jax.random.fold_in(key, 1))
    updates, optimiser = self.training.optimiser().update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(self.training.average, (1 + state.step) / (10 + state.step))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    return TrainState(state.step + 1, params, average, optimiser), metrics

  @functools.cached_property
  def update(self) -> Callable:
    """`step`, compiled."""
    return jax.jit(self.step, donate_argnums=0)

  @functools.cached_property
  def measure(self) -> Callable:
    """The compiled `(params, frozen, batch) -> metrics`."""
    return jax.jit(lambda params, frozen, batch: self.value(params, frozen, batch, jax.random.key(0))[1])

  def held_out(self, state: TrainState) -> dict[str, float]:
    """Metrics of the averaged weights on the rows that no update sees."""
    found = self.measure(state.average, self.frozen, jax.tree.map(lambda leaf: leaf[-HELD_OUT:], self.data))
    return {f"held_out_{name}": round(float(number), 5) for name, number in found.items()}

  def lower(self) -> jax.stages.Lowered:
    """The update for `--dry_run`, not run."""
    return self.update.lower(self.start(), self.frozen, self.data)

  def run(self, folder: pathlib.Path, log: Log) -> tuple[nnx.Module, dict[str, float]]:
    """Trains to the end, from the state in `folder` if there is one.

    Returns:
      The model of averaged weights, and its metrics on the held-out rows.
    """
    state = self.start()
    state = checkpoint.load_state(folder / "state.safetensors", state) or state
    bar = log.progress(self.training.steps, self.name, done=int(state.step))
    while (step := int(state.step) + 1) <= self.training.steps:
      state, metrics = self.update(state, self.frozen, self.data)
      bar.update()
      if step % 100 == 0:
        log.metrics(self.name, step, **{k: float(v) for k, v in metrics.items()})
        bar.set_postfix({k: f"{float(v):.3g}" for k, v in metrics.items()}, refresh=False)
      if step % SAVE_EVERY == 0 or step == self.training.steps:
        checkpoint.save_state(folder / "state.safetensors", state)
        log.metrics(self.name, step, **self.held_out(state))
    bar.close()
    return nnx.merge(self.parts[0], state.average), self.held_out(state)


def build(model_type: type[nnx.Module], config: Mapping, seed: int) -> nnx.Module:
  """A freshly initialised model."""
  return layers.initialised(lambda: model_type.from_json(config, rngs=nnx.Rngs(seed)))
