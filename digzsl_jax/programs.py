"""Traced steps that lie with a run: a second start reads them, where it would trace and lower them for seconds.

What XLA compiles of them lies in JAX's own cache, which it finds by the program. A file stands for what its name
fingerprints: the package's code, versions and shapes. Whatever else a step was traced from, settings above all, the
owner of the folder keeps the same.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jaxlib
from jax import export

from digzsl_jax import files, processes

# What a trace reads of jax.config.
FLAGS = ("jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64", "jax_numpy_dtype_promotion",
         "jax_threefry_partitionable")
# No other jaxlib reads what one wrote, so that custom calls as those of cuDNN mean the same.
CHECKS = (export.DisabledSafetyCheck.custom_call("ALL"),)
DIGEST = hashlib.sha256().digest_size  # bytes of it before every program


class Kept:
  """A step that is read from a folder, or traced at its first call and written there; for shapes that stay."""

  def __init__(self, step: Callable, outputs: Callable, folder: pathlib.Path, options: dict[str, Any] | None = None):
    """
    Args:
      step: jitted, `(*args) -> outputs`; all its arguments lie on its devices.
      outputs: `(*args) -> tree`, built as what `step` returns, at no cost.
      folder: of steps that were traced from the same settings.
      options: of the compiler.
    """
    self.lower = step.lower
    self._step, self._outputs, self._folder, self._options = step, outputs, folder, options
    self._call = None

  def __call__(self, *args: Any) -> Any:
    self._call = self._call or self._found(args) or self._step
    return self._call(*args)

  def _found(self, args: tuple) -> Callable | None:
    """None where JAX cannot write such a step, as for some backends or without its package for that."""
    file = self._folder / f"{self._step.__name__}-{_key(args)}.jax"
    if processes.told(lambda: _content(file) is not None):
      processes.await_file(file, lambda path: _content(path) is not None)
      program = export.deserialize(_content(file))
    else:
      try:
        program = self._traced(args)
        content = program.serialize()
      except (ImportError, NotImplementedError, ValueError):
        return None
      if processes.is_first():
        with contextlib.suppress(OSError):  # a full disk costs the next start its time alone
          _write(file, content)
    run, tree = jax.jit(program.call, compiler_options=self._options), jax.tree.structure(self._outputs(*args))
    return lambda *args: tree.unflatten(run(*jax.tree.leaves(args)))

  def _traced(self, args: tuple) -> export.Exported:
    """The step from leaves to leaves: of trees, JAX would have to be told a name for every class in them."""
    leaves, tree = jax.tree.flatten(args)

    def step(*leaves):
      return jax.tree.leaves(self._step(*tree.unflatten(leaves)))

    step.__name__ = self._step.__name__  # what logs and profiles call it
    return export.export(jax.jit(step), disabled_checks=CHECKS)(*leaves)


def _write(file: pathlib.Path, content: bytes) -> None:
  """In place of what other code or versions wrote."""
  for old in file.parent.glob(f"{file.name.rpartition('-')[0]}-*"):
    old.unlink(missing_ok=True)
  files.write_atomic(file, lambda temporary: temporary.write_bytes(hashlib.sha256(content).digest() + content))


def _content(file: pathlib.Path) -> bytearray | None:
  """A program as it was written; None if it is not there, or damaged."""
  try:
    content = bytearray(file.read_bytes())
  except OSError:
    return None
  return content[DIGEST:] if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST] else None


def _key(args: tuple) -> str:
  """Fingerprint of the code, versions, flags and devices, and of all that is known of arguments but their values."""
  device = jax.devices()[0]
  facts = [jax.__version__, jaxlib.__version__, device.platform, device.device_kind,
           *[getattr(jax.config, name) for name in FLAGS]]
  facts += [(jax.tree_util.keystr(path), jax.typeof(leaf), leaf.sharding)
            for path, leaf in jax.tree_util.tree_leaves_with_path(args)]
  digest = hashlib.sha256(repr(facts).encode())
  for source in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
    digest.update(source.read_bytes())
  return digest.hexdigest()[:16]
