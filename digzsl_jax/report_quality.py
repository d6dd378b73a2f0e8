"""The part of a report page about distances between generated and real images."""

from collections.abc import Iterator, Mapping, Sequence

from digzsl_jax import report_page as page

METRICS = {"fid": ("FID", 2), "kid": ("KID", 5), "cmmd": ("CMMD", 3)}  # name and decimals
ENOUGH = 10_000  # images for an FID by itself


def section(found: Mapping | None, names: Sequence[str], sources: Mapping[str, str]) -> page.Html | None:
  """Distances of all images and of each class.

  Args:
    found: what stage quality returns; None leaves the part out.
    names: of classes, in the order of the page.
    sources: what the page calls them.
  """
  if not found:
    return None
  series = [(source, sources[source]) for source in ("plain", "learned")]
  metrics = [metric for metric in METRICS if any(metric in found[source] for source in sources)]
  rows = [(source, [label, *(_cell(found[source], metric) for metric in metrics)]) for source, label in series[::-1]]
  per_class = {name: found["per_class"][name] for name in names if name in found["per_class"]}
  of_class = {metric: [(name, [entry[source].get(metric) for source, _ in series]) for name, entry in per_class.items()]
              for metric in ("cmmd", "kid")}
  limit = max(value for _, values in of_class["cmmd"] for value in values)
  charts = [page.tag("h3", "CMMD by class"), page.legend(*series),
            page.bars(of_class["cmmd"], series, max(limit, 1e-9), "CMMD by class", digits=METRICS["cmmd"][1])]
  if "kid" in metrics:  # can be below 0, where no bar goes
    of_classes = [(None, [name, *(page.number(value, METRICS["kid"][1]) for value in values)])
                  for name, values in of_class["kid"]]
    charts.append(page.tag("details", page.tag("summary", "KID by class"),
                           page.table(["", *(label for _, label in series)], of_classes, wide=False)))
  return page.section(
    "quality", "Image quality", "How far the generated pictures of the unseen classes are from their real test "
    "pictures, all together and, by CMMD, class by class: lower is nearer. Nothing was chosen by these numbers.",
    page.table(["", *(f"{METRICS[metric][0]}, lower is better" for metric in metrics)], rows, wide=False),
    page.tag("p", " ".join(_notes(found, "fid" in metrics)), class_="note"), *charts)


def _cell(values: Mapping, metric: str) -> str:
  """A distance, that of KID with its spread."""
  digits = METRICS[metric][1]
  spread = f" \u00b1 {page.number(values.get('kid_std'), digits)}" if metric == "kid" else ""
  return page.number(values.get(metric), digits) + spread


def _notes(found: Mapping, inception: bool) -> Iterator[str]:
  """What was compared, and what the numbers compare with."""
  counts = []
  for side in ("generated", "real"):
    each = [entry["images"][side] for entry in found["per_class"].values()]
    of_class = f"{min(each)} to {max(each)}" if min(each) < max(each) else f"{min(each)}"
    counts.append(f"{found['images'][side]} {side} pictures ({of_class} of a class)")
  yield (f"Each row compares {' with '.join(counts)}. CMMD is by the run's own CLIP, {found['clip']}: it compares with "
         "published numbers only where that is their ViT-L/14 at 336 pixels. Of few pictures it is too high, so most "
         "of all in single classes.")
  if inception:
    if min(found["images"].values()) < ENOUGH:
      yield (f"FID of so few pictures is far too high: it wants {ENOUGH:,}, and compares only with one of as many "
             "pictures.")
    yield (f"Inception sees them resized by \u201c{found['resize']}\u201d; \u00b1 is the spread of KID's subsets, and "
           "KID can be below 0.")
