"""Which patches of a picture say something of which others, by the attention of a vision tower: of TagCLIP's DMAR.

Shapes: b picture, i j patches, l m patches row by row.
"""

import functools

import jax
import jax.numpy as jnp

from digzsl_jax.models.clip_patches import in_turn


class Affinity:
  """From patch to patch: the mean attention of some layers where it is above its mean in enough of all layers."""

  def __init__(self, inside_bij: jax.Array, layers: int, first_layer: int, votes: int):
    check(layers, first_layer, votes)
    self.averaged, self.votes, self.layer = range(first_layer, layers - 1), votes, 0
    self.inside_bl1 = inside_bij.reshape(len(inside_bij), -1, 1)
    zeros = functools.partial(jnp.zeros, (*self.inside_bl1.shape[:2], self.inside_bl1.shape[1]))
    self.above_blm, self.sum_blm = zeros(jnp.int8 if layers < 128 else jnp.int32), zeros(jnp.float32)

  def add(self, weights_blm: jax.Array, x: jax.Array | None = None) -> jax.Array | None:
    """The next layer. What is computed from the returned `x`, itself unchanged, waits until it is counted."""
    def count(above_blm, sum_blm, weights_blm):
      pairs_b11 = self.inside_bl1.sum(1, keepdims=True)**2
      mean_b11 = weights_blm.sum((1, 2), keepdims=True, where=self.inside_bl1) / pairs_b11
      # A weight towards the padding is 0, which is never above the mean.
      above_blm += (weights_blm > mean_b11).astype(above_blm.dtype)
      return above_blm, sum_blm + weights_blm if self.layer in self.averaged else sum_blm

    kept = self.above_blm, self.sum_blm
    (self.above_blm, self.sum_blm), x = in_turn(self.inside_bl1, count, kept, weights_blm, x)
    self.layer += 1
    return x

  def result(self) -> jax.Array:
    return self.sum_blm / len(self.averaged) * (self.above_blm >= self.votes)


def check(layers: int, first_layer: int, votes: int) -> None:
  """Raises ValueError if a model of so many layers has too few for `Affinity`."""
  if not (0 <= first_layer < layers - 1 and 1 <= votes <= layers):
    raise ValueError(f"first_layer {first_layer} and votes {votes} do not fit a model of {layers} layers")
