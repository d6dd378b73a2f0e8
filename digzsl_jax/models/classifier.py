"""The zero-shot classifier: an ordinary softmax classifier on frozen features (arXiv 2412.17219).

The paper does not give its form; linear and one hidden layer are offered. Features are standardised by
the real images of seen classes, the only ones that every way of making unseen images shares.

Shapes: n image, b batch, f feature row, k class.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from digzsl_jax.models import layers


class Classifier(nnx.Module):
  """Logits of all classes from feature rows of `models/cdm.py`."""

  def __init__(self, columns: tuple[int, int], hidden: int, classes: int, *, dtype=jnp.float32,
               rngs: nnx.Rngs):
    """`columns` `[first, last)` of a row are used; `hidden` 0 is a linear classifier."""
    self.columns, width = tuple(columns), columns[1] - columns[0]
    self.mean = nnx.BatchStat(jnp.zeros(width))
    self.std = nnx.BatchStat(jnp.ones(width))
    self.fc1 = layers.linear(width, hidden, dtype=dtype, rngs=rngs) if hidden else None
    self.fc2 = layers.linear(hidden or width, classes, dtype=dtype, rngs=rngs)

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "Classifier":
    return cls(config["columns"], config["hidden"], len(config["classes"]), dtype=dtype, rngs=rngs)

  def standardise_by(self, features_nf: jax.Array) -> None:
    """Sets mean and standard deviation of each used column."""
    used = features_nf[:, slice(*self.columns)]
    self.mean[...], self.std[...] = used.mean(0), jnp.maximum(used.std(0), 1e-6)

  def standardised(self, features_bf: jax.Array) -> jax.Array:
    """The used columns, as `logits` takes them."""
    return (features_bf[..., slice(*self.columns)] - self.mean[...]) / self.std[...]

  def logits(self, x_bf: jax.Array) -> jax.Array:
    """`[b, k]`, of standardised columns."""
    return self.fc2(x_bf if self.fc1 is None else jax.nn.relu(self.fc1(x_bf)))

  def __call__(self, features_bf: jax.Array) -> jax.Array:
    """`[b, k]` logits."""
    return self.logits(self.standardised(features_bf))
