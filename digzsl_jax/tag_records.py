"""What `digzsl_jax.tag` keeps in its folder, so that the same command goes on where it was.

`tags.jsonl` has a line for each finished picture, which is added as soon as it is:

  {"file", "bytes", "modified", "tags": [{"label", "score"}, ...], "scores": {label: score}}

`bytes` and `modified` (nanoseconds) tell a picture from what stood under its name later. `tags_settings.json` says what
scores depend on beside the picture.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from digzsl_jax import files

RECORDS, SETTINGS = "tags.jsonl", "tags_settings.json"
SHOWN = 60  # characters of a setting in a message


class Records:
  """The records of one folder, all made with the same settings.

  Attributes:
    done: by file, with those of pictures that are of no concern now.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]):
    """Takes the folder for these settings.

    Args:
      settings: JSON-like. Of `{"name": ..., "files": ...}` the files alone count.

    Raises:
      ValueError: it holds records that were made with other settings; the message says which.
      OSError: it cannot be written.
    """
    self.path = folder / RECORDS
    settings = json.loads(json.dumps(settings))
    _check(folder, settings)
    lines = _lines(self.path)
    self.done = {record["file"]: record for record in map(_record, lines) if record}
    self.untidy = len(self.done) < len(lines) or bool(lines) and not lines[-1].endswith("\n")
    files.write_json(folder / SETTINGS, settings)

  def begin(self, paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Those of `paths` that are not done, or have changed since; `tags.jsonl` then has no line of these."""
    todo = [path for path in paths if not self._holds(path)]
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
    return record if {"file", "bytes", "modified", "tags", "scores"} <= record.keys() else None
  except (ValueError, AttributeError):
    return None


def _check(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Raises ValueError if the folder's records were made with other settings."""
  if not (folder / RECORDS).exists():
    return
  stored = files.read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
  if changed := [_difference(name, stored.get(name), settings.get(name))
                 for name in sorted(stored.keys() | settings.keys())
                 if _compared(stored.get(name)) != _compared(settings.get(name))]:
    raise ValueError(f"{folder / RECORDS} was made with other settings ({'; '.join(changed)}): choose another --out, "
                     "or delete that file to start anew")


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
