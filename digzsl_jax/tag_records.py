"""What `digzsl_jax.tag` keeps in its folders, so that the same command goes on where it was.

`<stem>.jsonl` has a line for each finished picture, which is added as soon as it is: an object with `file`, `bytes`,
`modified` and results. `bytes` and `modified` (nanoseconds) tell a picture from what stands under its name later.
`<stem>_settings.json` says what results depend on beside the picture.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from digzsl_jax import files

SHOWN = 60  # characters of a setting in a message


class Records:
  """The records of one folder, all made with the same settings.

  Attributes:
    done: by file, with those of pictures that are of no concern now.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any], *, stem: str, flag: str):
    """Takes the folder for these settings.

    Args:
      settings: JSON-like. Of `{"name": ..., "files": ...}` the files alone count.
      stem: of the names of both files.
      flag: what names another folder.

    Raises:
      ValueError: it holds records that were made with other settings; the message says which.
      OSError: it cannot be written.
    """
    self.path, stored = folder / f"{stem}.jsonl", folder / f"{stem}_settings.json"
    settings = json.loads(json.dumps(settings))
    if self.path.exists():
      _check(self.path, files.read_json(stored) if stored.exists() else {}, settings, flag)
    lines = _lines(self.path)
    self.done = {record["file"]: record for record in map(_record, lines) if record}
    self.untidy = len(self.done) < len(lines) or bool(lines) and not lines[-1].endswith("\n")
    files.write_json(stored, settings)

  @staticmethod
  def any_in(folder: pathlib.Path, stem: str) -> bool:
    """Whether a folder was taken before."""
    return (folder / f"{stem}_settings.json").exists()

  def begin(self, paths: Sequence[pathlib.Path],
            good: Callable[[Mapping[str, Any]], bool] = lambda record: True) -> list[pathlib.Path]:
    """Those of `paths` that are not done, have changed since, or whose record is not `good`; such records go."""
    todo = [path for path in paths if not (self._holds(path) and good(self.done[str(path)]))]
    changed = [self.done.pop(str(path)) for path in todo if str(path) in self.done]
    if changed or self.untidy or not self.path.exists():
      files.write_text(self.path, "".join(map(_line, self.done.values())))
    return todo

  def _holds(self, path: pathlib.Path) -> bool:
    record = self.done.get(str(path))
    return record is not None and [record["bytes"], record["modified"]] == state(path)

  def add(self, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records.

    Raises:
      OSError: there is no room; the message names the file. A line that is written in part counts for nothing.
    """
    records = list(records)
    try:
      with self.path.open("a", encoding="utf-8") as file:
        file.write("".join(map(_line, records)))
    except OSError as error:
      raise OSError(f"could not add to {self.path} ({error.strerror}); what is in it is kept, make room and give the "
                    "command again") from error
    self.done |= {record["file"]: record for record in records}


def state(path: pathlib.Path) -> list[int]:
  """Bytes and time of the last change, in nanoseconds; zeros where there is no such file any more."""
  try:
    status = os.stat(path)
  except OSError:
    return [0, 0]
  return [status.st_size, status.st_mtime_ns]


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps(record) + "\n"


def _lines(path: pathlib.Path) -> list[str]:
  if not path.exists():
    return []
  with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
    return list(file)


def _record(line: str) -> dict[str, Any] | None:
  """None for what is no whole record, as what a killed run wrote last."""
  try:
    record = json.loads(line)
    return record if {"file", "bytes", "modified"} <= record.keys() else None
  except (ValueError, AttributeError):
    return None


def _check(path: pathlib.Path, stored: Mapping[str, Any], settings: Mapping[str, Any], flag: str) -> None:
  """Raises ValueError if the records of a file were made with other settings."""
  if changed := [_difference(name, stored.get(name), settings.get(name))
                 for name in sorted(stored.keys() | settings.keys())
                 if _compared(stored.get(name)) != _compared(settings.get(name))]:
    raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}): choose another {flag}, or delete "
                     "that file to start anew")


def _compared(value: Any) -> Any:
  return value.get("files", value) if isinstance(value, dict) else value


def _difference(name: str, old: Any, new: Any) -> str:
  """What differs, in short: of lists what is gone and what is new, of a model its name if that says it."""
  if isinstance(old, list) and isinstance(new, list):
    gone, added = [each for each in old if each not in new], [each for each in new if each not in old]
    said = [f"{word} {_short(names)}" for word, names in (("without", gone), ("with", added)) if names]
    return f"{name}: {' and '.join(said) or 'in another order'}"
  if isinstance(old, dict) and isinstance(new, dict) and old.get("name") == new.get("name"):
    return f"{name}: {new.get('name')} has other files now"
  old, new = (value.get("name") if isinstance(value, dict) else value for value in (old, new))
  return f"{name}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
  text = ", ".join(map(repr, value)) if isinstance(value, list) else repr(value)
  return text if len(text) <= SHOWN else text[:SHOWN - 3] + "..."
