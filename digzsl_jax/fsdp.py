"""Frozen weights that do not fit on a device: divided over the mesh axis `fsdp`, gathered where a layer reads them.

Every device works on rows of its own, as without (Rajbhandari et al., arXiv 1910.02054, stage 3; nothing is trained
here, so that there are no gradients or optimiser states to divide). Weights are equal to the last bit once they are
gathered, and each is held for as long as its layer needs it.

Shapes: r row of a matrix, all its axes but the last; o output.
"""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

AXIS = "fsdp"
# Weights are the same in every round of a sampler's loop: XLA would gather all of them before it and keep them.
OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class Divided(nnx.Param):
  """`[r / devices, o]`, a device's rows of a weight of shape `whole`; only `jax.shard_map` can read it.

  Rows and not the largest axis: XLA gathers along the outermost axis, and would otherwise turn every weight round.
  """

  def get_value(self, **index) -> jax.Array:
    return jax.lax.all_gather(self.get_raw_value(), AXIS, tiled=True).reshape(self.whole)[index.get("index", ...)]


def divide(tree: Any, parts: int) -> Any:
  """`tree` with all weights whose rows `parts` divides as `[r, o]`, to be divided; vectors and the rest stay whole."""
  def one(leaf):
    rows = math.prod(leaf.shape[:-1])
    if not isinstance(leaf, nnx.Param) or leaf.ndim < 2 or rows % parts:
      return leaf
    # By numpy, which takes no second copy of a weight in the host's memory.
    return Divided(np.asarray(leaf.get_raw_value()).reshape(rows, -1), whole=leaf.shape)

  return jax.tree.map(one, tree, is_leaf=_is_variable)


def when(x: jax.Array, tree: Any) -> Any:
  """`tree`, whose divided weights can be gathered only once `x` is there, and for each `x` anew."""
  if not any(isinstance(leaf, Divided) for leaf in jax.tree.leaves(tree, is_leaf=_is_variable)):
    return tree
  nothing = 0 * x.ravel()[0]

  def one(leaf):
    if not isinstance(leaf, Divided):
      return leaf
    rows_ro = leaf.get_raw_value()
    return Divided(rows_ro + nothing.astype(rows_ro.dtype), whole=leaf.whole)

  return jax.tree.map(one, tree, is_leaf=_is_variable)


def specs(tree: Any) -> Any:
  """How every leaf of a tree out of `divide`, or of any other, lies on the mesh."""
  def one(leaf):
    spec = jax.sharding.PartitionSpec(*[AXIS] * isinstance(leaf, Divided))
    return jax.tree.map(lambda _: spec, leaf)

  return jax.tree.map(one, tree, is_leaf=_is_variable)


def on_host(devices: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
  """Within it models that will be divided are loaded into the host's memory: no device could take one whole.

  Raises:
    ValueError: JAX was told to leave the host alone.
  """
  if AXIS not in devices.axis_names:
    return contextlib.nullcontext()
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError as error:
    raise ValueError(f"config.mesh.fsdp loads weights by way of the host, which JAX_PLATFORMS leaves out ({error}); "
                     "unset it or add \",cpu\"") from error


def _is_variable(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable)
