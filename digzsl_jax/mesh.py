"""The device mesh. Class is batch: rows of classes are sharded over all devices.

It spans those of all processes, side by side. Its one axis is `class`; where weights are divided (`fsdp.py`) there is
a second one, of the neighbours that share them. Rows are sharded over both: each device has its own in either case.
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax import fsdp as weights
from digzsl_jax import programs

AXIS = "class"
CPU_DEVICES = 2


def divide_cpu() -> None:
  """Makes a CPU two devices, unless the environment says how many; to be called before JAX looks for devices.

  With pictures as small as those of the small worlds, one device keeps hardly more than one core busy. Two, however
  many cores there are: every device holds all weights, and the batches of the small worlds are not larger.
  """
  told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not told and jax.config.jax_num_cpu_devices < 0:  # JAX_NUM_CPU_DEVICES
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def make(devices: int, fsdp: int = 1) -> jax.sharding.Mesh:
  """A mesh of the first `devices` devices, 0 for all; of several processes each gives as many.

  Args:
    devices: their number.
    fsdp: neighbours that divide the weights of the frozen models among them, 1 for whole weights on every device.

  Raises:
    ValueError: there are fewer devices, processes would give different numbers, or `fsdp` does not divide them.
  """
  found, hosts = jax.devices(), jax.process_count()
  if not 0 <= devices <= len(found):
    raise ValueError(f"config.mesh.devices is {devices}, but JAX sees {len(found)} device(s): {found}. On a CPU, "
                     "JAX_NUM_CPU_DEVICES=8 makes eight")
  of_host = [[device for device in found if device.process_index == host] for host in range(hosts)]
  if devices % hosts or len(set(map(len, of_host))) > 1:
    raise ValueError(f"config.mesh.devices is {devices}, but {hosts} processes with {[*map(len, of_host)]} devices "
                     "have to give equally many; use a multiple of their number, or 0 where they have equally many")
  found = [device for own in of_host for device in own[:devices // hosts or None]]
  if fsdp not in (fits := [n for n in range(1, len(found) + 1) if len(found) % n == 0]):
    raise ValueError(f"config.mesh.fsdp is {fsdp}, but weights are divided among groups of as many of the "
                     f"{len(found)} devices of the mesh: use one of {fits}, 1 for whole weights on every device")
  axes = (AXIS, weights.AXIS) if fsdp > 1 else (AXIS,)
  # Auto: the compiler propagates shardings; `jax.make_mesh` would now default to Explicit.
  return jax.sharding.Mesh(np.array(found).reshape(-1, *[fsdp] * (fsdp > 1)), axes,
                           axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def by_class(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Leading axis sharded over all devices."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """A whole copy on every device."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def place(tree: Any, sharding: Any) -> Any:
  """Arrays that every process has whole, over the devices of `sharding`; each process hands its own ones their part.

  `sharding` is one for all, or a tree with one for every array.
  """
  if all(one.is_fully_addressable for one in jax.tree.leaves(sharding)):
    return jax.device_put(tree, sharding)

  def one(leaf, sharding):
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

  return jax.tree.map(one, tree, jax.tree.broadcast(sharding, tree))


def place_models(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """What all rows share, for `compile_chunked`: whole on every device, but for weights that the mesh divides."""
  if weights.AXIS in mesh.axis_names:
    tree = weights.divide(tree, mesh.shape[weights.AXIS])
  return place(tree, jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), weights.specs(tree)))


def fetch(tree: Any) -> Any:
  """Sharded arrays as whole ones of numpy, in every process."""
  meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if not leaf.is_fully_addressable}
  return jax.device_get(_gather(*meshes)(tree) if meshes else tree)


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable:
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def compile_chunked(function: Callable, idle: Callable, devices: jax.sharding.Mesh, size: int,
                    busy: Callable = lambda *rows: True, keep: pathlib.Path | None = None) -> Callable:
  """Compiles `function(common, *rows)` for rows sharded over the mesh, with equal results on every mesh.

  XLA sums in another order when a compiled body has another number of rows. So every device works
  through chunks of a fixed `size`, one after another, and the bits do not depend on the mesh.

  Args:
    function: `(common, *rows) -> outputs`; every leaf of rows and outputs leads with the sharded axis,
      of `size` entries or a multiple of it. `common` comes out of `place_models` or is replicated.
    idle: as `function`, at no cost: the outputs of a chunk that has nothing to do.
    devices: the mesh.
    size: entries of the first leaf of `rows` that one call of `function` sees.
    busy: `rows -> bool`, whether a chunk has something to do.
    keep: folder in which a second start finds the traced program, see `programs`.

  Returns:
    The compiled function of the same arguments, for any number of entries that is a multiple of `size`
    times the number of devices.
  """
  def per_device(common, *rows):
    count = jax.tree.leaves(rows)[0].shape[0] // size
    chunks = jax.tree.map(lambda leaf: leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:]), rows)
    # One more that is always skipped: XLA would unroll a loop of one chunk and fuse it in another way.
    chunks = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), chunks)

    def body(chunk):
      number, rows = chunk
      wanted = (number < count) & busy(*rows)
      if weights.AXIS in devices.axis_names:  # those that gather weights together go the same way
        wanted = jax.lax.pmax(wanted.astype(jnp.int32), weights.AXIS) > 0
      return jax.lax.cond(wanted, function, idle, common, *rows)

    join = lambda leaf: leaf[:count].reshape(count * leaf.shape[1], *leaf.shape[2:])
    return jax.tree.map(join, jax.lax.map(body, (jnp.arange(count + 1), chunks)))

  def sharded(common, *rows):
    own = by_class(devices).spec
    return jax.shard_map(per_device, mesh=devices, in_specs=(weights.specs(common), *[own] * len(rows)), out_specs=own,
                         check_vma=False)(common, *rows)

  sharded.__name__ = function.__name__  # what logs and profiles call it
  options = weights.OPTIONS if weights.AXIS in devices.axis_names else None
  step = jax.jit(sharded, compiler_options=options)
  return programs.Kept(step, functools.partial(jax.eval_shape, idle), keep, options) if keep else step


def mean_of_parts(function: Callable, rows, groups: int, parts: int):
  """The mean of `function` over parts of rows, one part after another.

  Args:
    rows: every leaf leads with an axis of `groups` groups of equally many rows, one group behind the other.
    parts: into which every group is divided; each has rows of all groups.
  """
  if parts == 1:
    return function(rows)

  def divided(x):
    size = x.shape[0] // (groups * parts)
    x_pgs = jnp.moveaxis(x.reshape(groups, parts, size, *x.shape[1:]), 1, 0)
    return x_pgs.reshape(parts, groups * size, *x.shape[1:])

  return jax.tree.map(lambda x: x.mean(0), jax.lax.map(function, jax.tree.map(divided, rows)))
