"""Parts of `report.html` that the reports of all methods share.

Shapes: h w pixel, c colour channel.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from digzsl_jax import report_page as page
from digzsl_jax.report_page import Html, tag


def ordered(found: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """`found` in the order of `names`, which a JSON file does not keep; what has no name comes last."""
  return {name: found[name] for name in (*(n for n in names if n in found), *found)}


def data_uri(image_hwc: np.ndarray, longest: int, kind: str = "png") -> str:
  """A picture inside the page, reduced to `longest` pixels where it is larger; `kind` is "png" or "jpeg"."""
  picture, buffer = Image.fromarray(image_hwc), io.BytesIO()
  picture.thumbnail((longest, longest))
  picture.save(buffer, format=kind, quality=85)  # of which a PNG takes no notice
  return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def duration(seconds: float) -> str:
  """In seconds, from 90 of them in minutes, from 90 minutes in hours."""
  if seconds < 90:
    return f"{seconds:.1f} s"
  return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def label_bars(name: str, title: str, guide: str, shown: Mapping[str, tuple[str, Mapping[str, float | None]]],
               most: int) -> Html:
  """Average precision of each label, best first by the first method; at most `most`, the best and the worst.

  Args:
    name: of the section, as are title and guide.
    shown: by CSS class, the name of a method and its average precisions by label.
  """
  (_, ours), *_ = shown.values()
  order = sorted((label for label in ours if page.known(ours[label])), key=lambda label: -ours[label])
  left_out = len(order) - most
  if left_out > 0:
    order = order[:most - most // 2] + order[-(most // 2):]
  rows = [(label, [values[label] for _, values in shown.values()]) for label in order]
  keys = [(kind, method) for kind, (method, _) in shown.items()]
  note = tag("p", f"{left_out} labels between the upper and the lower half are not shown; results.json has them.",
             class_="note") if left_out > 0 else None
  return page.section(name, title, guide, page.legend(*keys), page.bars(rows, keys, 100, title), note)


def stage_times(results: Mapping, stages: Iterable[str]) -> Html | None:
  """Seconds of each stage; None where none are recorded."""
  seconds = ordered(results.get("seconds", {}), stages)
  if not seconds:
    return None
  rows = [(name, [value]) for name, value in seconds.items()]
  return page.section(
    "times", "Stage times", "Seconds of each stage before the evaluation, compilation included: the longest "
    "bar is the one to speed up.",
    page.bars(rows, [("other", "seconds")], max(*seconds.values(), 1e-9), "seconds by stage", digits=1))


def appendix(results: Mapping, config: Mapping) -> Html:
  """The validation task, on which settings were chosen, and the config, to repeat the run."""
  blocks = {"Numbers of the validation classes": results.get("validation"), "Config": config}
  folded = (tag("details", tag("summary", name), tag("pre", json.dumps(value, indent=2, default=str)))
            for name, value in blocks.items() if value)
  return page.section("appendix", "To repeat it", "What was measured on the validation classes, on which "
                      "settings are chosen, and the settings themselves.", *folded)
