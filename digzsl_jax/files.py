"""Writing a file so that a reader finds the old one or the whole new one, never a part."""

import os
import pathlib
from collections.abc import Callable

import safetensors


def write_atomic(path: os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
  """Calls `write(temporary path)` and renames the result to `path`; a failed write leaves nothing.

  Raises:
    OSError: it could not be written; the message names the file and what to do.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
                  "another --workdir and start again") from error
  finally:
    temporary.unlink(missing_ok=True)
