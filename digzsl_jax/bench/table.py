"""Lines of `bench.jsonl` as tables in Markdown; knows nothing of JAX."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TEXT = ("bench", "size", "implementation")
NEEDED = (*TEXT, "device", "device_count", "dtype", "p50_ms")


def _number(name: str, digits: int = 3, scale: float = 1.0):
  def cell(line: Mapping[str, Any]) -> str:
    if (value := line.get(name)) is None:
      return ""
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
  return cell


def _range(line: Mapping[str, Any]) -> str:
  return f"{_number('p10_ms')(line)}\u2013{_number('p90_ms')(line)}"


COLUMNS = {
    "bench": lambda line: line["bench"], "size": lambda line: line["size"], "by": lambda line: line["implementation"],
    "batch": _number("batch"), "steps": _number("steps"), "images": _number("images"), "n": _number("repetitions"),
    "p50 ms": _number("p50_ms"), "p10\u2013p90": _range, "CPU ms": _number("cpu_p50_ms"),
    "images/s/chip": _number("images_per_second_per_chip"), "TFLOP": _number("tflop"),
    "MFU sheet %": _number("mfu_datasheet", scale=100), "MFU measured %": _number("mfu_measured", scale=100),
    "MFU CPU %": _number("mfu_cpu", scale=100),
    "compile s": _number("compile_seconds"), "first s": _number("first_call_seconds"),
    "first s, warm": _number("first_call_seconds_warm"), "peak GiB": _number("peak_memory_gib"),
    "RSS GiB": _number("peak_rss_gib"), "times as fast": _number("ratio"), "by CPU time": _number("cpu_ratio"),
    "error": _number("relative_error", 2), "load": _number("load1")}
LEGEND = (
    "CPU ms: of all threads, for hosts that others use too. MFU: analytic FLOP over time, against the data sheet and "
    "against products of matrices in the same run; MFU CPU by CPU time. first s: of the first call, cold, and warm in "
    "a second process with the compilation cache. times as fast: as the peer in the next row. error: norm of the "
    "difference over that of the peer's answer.")


def read(paths: Iterable[pathlib.Path]) -> tuple[list[dict[str, Any]], list[str]]:
  """`(lines, what could not be read)`; a line knows its `file`."""
  lines, problems = [], []
  for path in paths:
    try:
      text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      problems.append(f"{path}: {getattr(error, 'strerror', None) or error}")
      continue
    for number, row in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
      try:
        line = json.loads(row)
        if missing := [name for name in NEEDED if name not in line]:
          raise ValueError(f"no {', '.join(missing)}")
      except (ValueError, TypeError) as error:
        problems.append(f"{path}, line {number}: not a line of a bench ({error})")
      else:
        lines.append(line | {"file": str(path)})
  return lines, problems


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
  """A table for every device and dtype; columns that nothing fills are left out."""
  parts: dict[tuple, list[Mapping[str, Any]]] = {}
  for line in lines:
    parts.setdefault((line["device_count"], line["device"], line["dtype"]), []).append(line)
  several = len({line["file"] for line in lines}) > 1
  tables = []
  for (count, device, dtype), rows in parts.items():
    columns = ({"file": lambda line: line["file"]} if several else {}) | COLUMNS
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(text not in ("", "\u2013") for text in column)}
    table = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    table += ["| " + " | ".join(row) + " |" for row in zip(*cells.values())]
    tables.append("\n".join([f"### {count} x {device}, {dtype}", "", f"{_origin(rows)}", "", *table]))
  return "\n\n".join([*tables, LEGEND]) if tables else ""


def _origin(rows: Sequence[Mapping[str, Any]]) -> str:
  """Versions, commits, times and flags of some lines."""
  wanted = ("python", "jax", "jaxlib", "flax", "torch", "diffusers", "transformers")
  found = {f"{name} {row.get('versions', {})[name]}": None for name in wanted for row in rows
           if name in row.get("versions", {})}
  commits = {f"commit {row['git']}": None for row in rows if row.get("git")}
  days = sorted({row["time"][:10] for row in rows if row.get("time")})
  flags = {f"XLA_FLAGS={row['flags']}": None for row in rows if row.get("flags")}
  return ", ".join([*found, *commits, *days, *flags])
