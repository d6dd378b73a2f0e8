"""What a run can go on from after a kill: saved states, fingerprints, and the folders of its stages.

Of several processes the first one writes states and marks of stages; all of them call what does so.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from digzsl_jax import processes
from digzsl_jax.files import read_json, write_atomic, write_json

LARGE = 2**26  # bytes of a file whose digest is remembered


def write_arrays(path: os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes named arrays as one safetensors file."""
  arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
  write_atomic(path, lambda temporary: safetensors.numpy.save_file(arrays, temporary, {"format": "pt"}))


def read_arrays(path: os.PathLike) -> dict[str, np.ndarray]:
  """Reads a safetensors file as numpy arrays by name.

  Raises:
    ValueError: the file is missing or damaged.
  """
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is missing or damaged ({error}); delete its folder to make it anew") from error


def save_state(path: os.PathLike, state: Any) -> None:
  """Writes a pytree of arrays (parameters, optimiser, step), whole in every process, for an exact resume."""
  if not processes.is_first():
    return
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


def resume_state(path: os.PathLike, like: Any) -> Any | None:
  """`load_state` to go on from, the same in all processes: from different states they would wait for each other."""
  path = pathlib.Path(path)
  if not (first := processes.told(lambda: path.exists() and fingerprint_file(path))):
    return None
  if not processes.is_first():
    processes.await_file(path, lambda path: path.exists() and fingerprint_file(path) == first)
  return load_state(path, like)


def fingerprint(value: Any) -> str:
  """Short sha256 of a JSON-like value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_file(path: os.PathLike) -> str:
  """Fingerprint of a file's content."""
  return _digest(pathlib.Path(path)).hex()[:16]


def fingerprint_folder(folder: os.PathLike) -> str:
  """Fingerprint of the names and contents of all files below `folder`."""
  folder = pathlib.Path(folder)
  return fingerprint_files(folder, [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()])


def fingerprint_files(folder: os.PathLike, names: Iterable[str | os.PathLike]) -> str:
  """Fingerprint of the names and contents of some files of `folder`."""
  digest = hashlib.sha256()
  for name in sorted(map(pathlib.Path, names)):
    digest.update(str(name).encode() + _digest(pathlib.Path(folder) / name))
  return digest.hexdigest()[:16]


def _digest(path: pathlib.Path) -> bytes:
  """SHA-256 of a file. That of a large one is kept beside compiled code for as long as its size and times stand."""
  status, cache = path.stat(), jax.config.jax_compilation_cache_dir
  record = pathlib.Path(cache or "", "digests.json")
  remembered = bool(cache) and status.st_size >= LARGE
  known = _read_digests(record) if remembered else {}
  state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
  if known.get(str(path.resolve()), [])[:-1] == state:
    return bytes.fromhex(known[str(path.resolve())][-1])
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").digest()
  if remembered:
    with contextlib.suppress(OSError):  # a folder that is closed to writing costs time alone
      write_json(record, _read_digests(record) | {str(path.resolve()): [*state, digest.hex()]})
  return digest


def _read_digests(record: pathlib.Path) -> dict[str, list]:
  try:
    return read_json(record)
  except (OSError, ValueError):
    return {}


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
    """Of the inputs; it is among the inputs of the stages that read this one."""
    return fingerprint(self.inputs)

  @property
  def programs(self) -> pathlib.Path:
    """Where its traced steps lie; hidden, as no result depends on them."""
    return self.folder / ".programs" / self.fingerprint

  @property
  def done(self) -> bool:
    """Whether the result is there."""
    return (self.folder / "done.json").exists()

  def claim(self) -> None:
    """Takes the folder for these inputs; one that nothing was made in yet is free for any.

    Raises:
      ValueError: what is in it was made from other inputs; the message names the fields.
    """
    record, inputs = self.folder / "inputs.json", json.loads(json.dumps(self.inputs, default=str))
    made = [path for path in self.folder.glob("[!.]*") if path.name not in ("inputs.json", "seconds.json")]
    if made:
      old, new = _flat(read_json(record) if record.exists() else {}), _flat(inputs)
      changed = [f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
                 for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
      if changed:
        raise ValueError(f"{self.folder} was made from other settings ({'; '.join(changed)}). Use another "
                         "--workdir, restore the setting, or delete that folder and the stages after it")
    else:
      (self.folder / "seconds.json").unlink(missing_ok=True)
      write_json(record, inputs)

  def require(self) -> pathlib.Path:
    """The folder of a finished stage, for a stage that reads it.

    Raises:
      ValueError: it has not finished, or was made from other inputs.
    """
    if not self.done:
      raise ValueError(f"stage {self.folder.name} has not finished in {self.folder.parent}; add it to "
                       "--config.stages")
    self.claim()
    return self.folder

  def finish(self, results: Mapping[str, Any]) -> None:
    """Marks the stage as finished, with its summary (seconds, losses, counts)."""
    write_json(self.folder / "done.json", dict(results))

  def make(self, function: Callable[[], Mapping[str, Any] | None]) -> None:
    """Calls `function` and finishes with what it returns and the seconds of all attempts (unless killed by -9).

    Of several processes all call it, and what the first one's `function` returns counts.
    """
    if processes.is_first():
      self._make(function)
    else:
      function()
    processes.written(self.folder / "done.json")

  def _make(self, function: Callable[[], Mapping[str, Any] | None]) -> None:
    spent = self.folder / "seconds.json"
    before, start = read_json(spent) if spent.exists() else 0, time.monotonic()
    try:
      results = function()
    finally:
      seconds = round(before + time.monotonic() - start, 1)
      write_json(spent, seconds)
    self.finish(dict(results or {}, seconds=seconds))

  def results(self) -> dict[str, Any]:
    """The summary of a finished stage, as `finish` wrote it."""
    return read_json(self.folder / "done.json")


def check_method(workdir: pathlib.Path, method: str) -> None:
  """Raises ValueError if `workdir` is that of another method, with whose stages these do not collide."""
  record = workdir / "config.json"
  if record.exists() and (before := read_json(record).get("method")) != method:
    raise ValueError(f"{workdir} belongs to a run of config.method {before!r}, not {method!r}; use another --workdir")


def choose(asked: Iterable[str], known: Iterable[str]) -> list[str]:
  """The stages that were asked for, in the order of `known`.

  Raises:
    ValueError: one that is not known.
  """
  asked, known = set(asked), list(known)
  if unknown := sorted(asked - set(known)):
    raise ValueError(f"config.stages: {unknown} unknown; choose among {known}")
  return [name for name in known if name in asked]


def claim(stages: Mapping[str, Stage], needs: Mapping[str, tuple[str, ...]], asked: Iterable[str]) -> None:
  """Takes the folders of the stages that were asked for, before anything is made.

  Raises:
    ValueError: a folder was made from other inputs, or a needed stage is neither asked for nor finished; or
      processes differ in what a stage is made from.
  """
  asked = list(asked)
  for name, stage in stages.items():
    processes.check_same(f"what stage {name} is made from", _flat(stage.inputs))
  processes.meet()
  if not processes.is_first():
    return
  for name in asked:
    for need in needs[name]:
      if need not in asked:
        stages[need].require()
  for name in asked:
    stages[name].claim()
