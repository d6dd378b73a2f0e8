"""Files that survive a kill: atomic writes, fingerprints, and the folder of one stage.

Everything is written under a temporary name in the same folder and then renamed, so a reader finds
either the old file or the whole new one.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy


def write_atomic(path: os.PathLike, write: Callable[[str], None]) -> None:
  """Calls `write(temporary_name)` and renames the result to `path`; a failed write leaves nothing."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  name = str(path.parent / f".{path.name}.{os.getpid()}")
  try:
    write(name)
    os.replace(name, path)
  except OSError as error:
    raise OSError(f"could not write {path}: {error.strerror or error}; finished files are untouched, "
                  "free some space or choose another --workdir and start again") from error
  finally:
    pathlib.Path(name).unlink(missing_ok=True)


def write_json(path: os.PathLike, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: os.PathLike, text: str) -> None:
  write_atomic(path, lambda name: pathlib.Path(name).write_text(text))


def read_json(path: os.PathLike) -> Any:
  try:
    return json.loads(pathlib.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not valid JSON ({error}); delete it to make it anew") from error


def write_arrays(path: os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes named arrays as one safetensors file."""
  arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
  write_atomic(path, lambda name: safetensors.numpy.save_file(arrays, name, metadata={"format": "pt"}))


def read_arrays(path: os.PathLike) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is missing or damaged ({error}); delete its folder to make it anew") from error


def save_state(path: os.PathLike, state: Any) -> None:
  """Writes a pytree of arrays (parameters, optimiser, step) for an exact resume."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
  write_arrays(path, {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves})


def load_state(path: os.PathLike, like: Any) -> Any | None:
  """Reads what `save_state` wrote, as numpy arrays in the structure of `like`; None where there is no file.

  Raises:
    ValueError: the file is damaged or its arrays are not those of `like`.
  """
  if not pathlib.Path(path).exists():
    return None
  arrays = read_arrays(path)
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {jax.tree_util.keystr(key): np.shape(leaf) for key, leaf in leaves}
  if wanted != {name: array.shape for name, array in arrays.items()}:
    raise ValueError(f"{path} holds the state of something else; delete it to start its stage anew")
  return jax.tree.unflatten(structure, [arrays[name] for name in wanted])


def fingerprint(value: Any) -> str:
  """Short sha256 of a JSON-like value or of bytes."""
  data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
  return hashlib.sha256(data).hexdigest()[:16]


def fingerprint_folder(folder: os.PathLike) -> str:
  """Fingerprint of the names and contents of all files below `folder`."""
  digest = hashlib.sha256()
  for path in sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file()):
    digest.update(str(path.relative_to(folder)).encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(value, Mapping):
    return {prefix: value}
  return {k: v for name, child in value.items()
          for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()}


@dataclasses.dataclass(frozen=True)
class Stage:
  """The folder of one stage: what it was made from and, once finished, that it is.

  Attributes:
    folder: where the stage's files are.
    inputs: settings and fingerprints of everything the result depends on (JSON-like).
  """

  folder: pathlib.Path
  inputs: Mapping[str, Any]

  @property
  def fingerprint(self) -> str:
    return fingerprint(self.inputs)

  def finished(self) -> bool:
    """Whether the result is there; the first call claims the folder.

    Raises:
      ValueError: the folder was made from other inputs; the message names the fields.
    """
    record, inputs = self.folder / "inputs.json", json.loads(json.dumps(self.inputs, default=str))
    if record.exists():
      old, new = _flat(read_json(record)), _flat(inputs)
      changed = [f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
                 for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
      if changed:
        raise ValueError(f"{self.folder} was made from other settings ({'; '.join(changed)}). Use another "
                         "--workdir, restore the setting, or delete that folder and the stages after it")
    else:
      write_json(record, inputs)
    return (self.folder / "done.json").exists()

  def finish(self, results: Mapping[str, Any]) -> None:
    """Marks the stage as finished, with its summary (seconds, losses, counts)."""
    write_json(self.folder / "done.json", dict(results))

  def results(self) -> dict[str, Any]:
    return read_json(self.folder / "done.json")
