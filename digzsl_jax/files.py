"""Files that a reader finds old or wholly new, never in part; and JSON, read and written in one way."""

import contextlib
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import safetensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # never read in a run, as they can run any code


def write_atomic(path: os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
  """Calls `write(temporary path)` and renames the result to `path`; a failed write leaves nothing.

  Raises:
    OSError: it could not be written; the message names the file and what to do.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # safetensors leaves its files closed to everybody else
    os.replace(temporary, path)
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, "strerror", None) or error
    raise OSError(f"could not write {path}: {reason}; finished files are untouched, free some space or choose "
                  "another --workdir or --out and start again") from error
  finally:
    with contextlib.suppress(OSError):  # where a file stands in the place of its folder there is none either
      temporary.unlink(missing_ok=True)


def write_text(path: os.PathLike, text: str) -> None:
  """Writes UTF-8 text with `write_atomic`.

  Raises:
    OSError: as `write_atomic`.
  """
  write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: os.PathLike, value: Any) -> None:
  """Writes indented JSON with sorted keys.

  Raises:
    OSError: as `write_atomic`.
  """
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: os.PathLike) -> Any:
  """Reads what `write_json` wrote.

  Raises:
    ValueError: the file is not valid JSON.
    OSError: it is absent or cannot be read.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON ({error}); delete it to make it anew") from error
