"""Pages of thumbnails with their tags: `contact_sheet.html`, then `contact_sheet_2.html` and so on.

Each page holds its thumbnails itself and loads nothing; a click on one opens the picture where it was.
"""

import collections
import concurrent.futures
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from digzsl_jax import files, report_page, report_parts
from digzsl_jax.data import pictures
from digzsl_jax.report_page import Html, tag

STEM = "contact_sheet"
PER_PAGE = 300  # pictures: some megabytes
LONGEST = 320  # pixels of a thumbnail
TINY = 96  # pixels; a picture no longer than this is kept as it is and shown in whole pixels
TAGS, NEXT = 8, 2  # that are shown of a picture: tags, and labels that come next
TAG, OTHER = "learned", "other"  # their CSS classes
COUNTED = 40  # labels in the chart of the first page
STYLE = """
body { max-width: 1500px; }
.sheet {
  display: grid; gap: 1.1rem 1rem; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); margin: 1.4rem 0;
}
.card { background: var(--panel); border-radius: 8px; overflow: hidden; min-width: 0; }
.card > a { display: block; height: 190px; padding: 6px; background: var(--line); }
.card img { width: 100%; height: 100%; object-fit: contain; display: block; }
.card figcaption { padding: .5rem .7rem .7rem; }
.name {
  font-size: .78rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; margin: 0 0 .3rem;
  direction: rtl; text-align: left;
}
.score {
  display: grid; grid-template-columns: 1fr auto; gap: 0 .6em; font-size: .86rem; line-height: 1.4; color: var(--ink);
}
.score span { overflow-wrap: anywhere; }
.score u { text-decoration: none; outline: 1px solid var(--soft); }
.score b { font-weight: 400; font-variant-numeric: tabular-nums; }
.score i { grid-column: 1 / -1; height: 4px; border-radius: 2px; background: var(--line); margin-bottom: .2rem; }
.score i::before {
  content: ""; display: block; height: 100%; width: var(--w); border-radius: 2px; background: var(--c);
}
.score.other { color: var(--soft); }
.score.other i::before { opacity: .5; }
.pages a, .pages b { display: inline-block; padding: .1em .55em; }
.pages a, .sheet a { color: var(--learned); }
"""


class Overlay(NamedTuple):
  """A picture under its masks.

  Attributes:
    path: where it is.
    height: what is below that is a legend, which a card has no need of.
    colours: of all labels, as CSS has them.
  """

  path: pathlib.Path
  height: int
  colours: Mapping[str, str]


class Shown(NamedTuple):
  """A picture of the sheet.

  Attributes:
    file: its name, as it was given.
    tags: which labels it has.
    scores: of all labels.
    overlay: to show in its place.
  """

  file: str
  tags: Sequence[str]
  scores: Mapping[str, float]
  overlay: Overlay | None = None


def write(folder: pathlib.Path, shown: Sequence[Shown], wrong: Mapping[str, str], facts: Iterable[tuple[str, object]],
          progress: Callable[[int], tqdm.tqdm]) -> pathlib.Path:
  """Writes the pages and returns the first one; pages of an earlier, longer sheet go.

  Args:
    folder: where they go.
    shown: in the order of the pages.
    wrong: by file, what is wrong with pictures that could not be read.
    facts: what the first page says of settings.
    progress: makes a bar for so many pictures.
  """
  more = range(2, -(-len(shown) // PER_PAGE) + 1)
  names = [f"{STEM}.html", *(f"{STEM}_{number}.html" for number in more)]
  full = max((max(each.scores.values()) for each in shown), default=0) or 1
  with progress(len(shown)) as bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for number, name in enumerate(names):
      part = shown[number * PER_PAGE:(number + 1) * PER_PAGE]
      cards = []
      for card in threads.map(lambda each: _card(each, folder, full), part):
        cards.append(card)
        bar.update()
      before = (_head(shown, wrong, facts),) if not number else ()
      links = _links(names, number)
      files.write_text(folder / name, report_page.page(
          f"Tags of {counted(len(shown), 'picture')}", *before, links, tag("div", *cards, class_="sheet"), links,
          style=STYLE))
  for path in folder.glob(f"{STEM}_*.html"):
    if path.name not in names:
      path.unlink()
  return folder / names[0]


def counted(count: int, what: str) -> str:
  """As "1 picture" or "2,000 pictures"."""
  return f"{count:,} {what}{'' if count == 1 else 's'}"


def _head(shown: Sequence[Shown], wrong: Mapping[str, str], facts: Iterable[tuple[str, object]]) -> Html:
  counts = collections.Counter(label for each in shown for label in each.tags)
  most = counts.most_common(COUNTED)
  chart = most and tag(
      "details", tag("summary", f"How often: {counted(len(counts), 'label')}" + (
          f", here the {COUNTED} most frequent" if len(counts) > COUNTED else "")),
      report_page.bars([(label, [count]) for label, count in most], [("learned", "pictures")], most[0][1],
                       "pictures by label"))
  damaged = wrong and tag("div", tag("p", f"{counted(len(wrong), 'picture')} could not be read:"),
                          *(tag("p", said) for said in wrong.values()), class_="alarm")
  guide = tag("p", "Blue bars are the tags of a picture, best first; grey ones are the labels that came next. The "
              "longest bar is the highest score of all pictures. A click opens a picture.", class_="guide")
  return report_page.join(tag("h1", f"Tags of {counted(len(shown), 'picture')}"), guide, report_page.facts(facts),
                          damaged or None, chart or None)


def _links(names: Sequence[str], here: int) -> Html | None:
  """To the other pages."""
  if len(names) == 1:
    return None
  entries = (tag("b", number + 1) if number == here else tag("a", number + 1, href=name)
             for number, name in enumerate(names))
  return tag("p", "Pages", *entries, class_="pages")


def _card(each: Shown, folder: pathlib.Path, full: float) -> Html:
  """`full` is the score of a whole bar."""
  colours = each.overlay.colours if each.overlay else {}
  bar = lambda label, kind: _score(label, each.scores[label], full, kind, colours.get(label) if kind != OTHER else None)
  ranked = sorted(each.tags, key=lambda label: -each.scores[label])
  others = sorted(each.scores.keys() - set(ranked), key=lambda label: (-each.scores[label], label))[:NEXT]
  more = len(ranked) - TAGS
  href = urllib.parse.quote(os.path.relpath(os.path.abspath(each.file), os.path.abspath(folder)), errors="replace")
  # The name may be long, and its end matters: it is set from right to left, with a mark that keeps its own order.
  name = tag("p", Html("&lrm;"), each.file, Html("&lrm;"), class_="name soft", title=each.file)
  return tag("figure", tag("a", _thumbnail(each), href=href), tag(
      "figcaption", name, *(bar(label, TAG) for label in ranked[:TAGS]),
      tag("p", f"and {more} more", class_="soft", title=", ".join(ranked[TAGS:])) if more > 0 else None,
      *(bar(label, OTHER) for label in others)), class_="card")


def _score(label: str, score: float, full: float, kind: str, colour: str | None) -> Html:
  """A label with its bar, and with the colour of its mask if it has one."""
  key = colour and tag("u", class_="key", style=f"--c: {colour}")
  bar = tag("i", style=f"--w: {100 * score / full:.1f}%")
  return tag("div", tag("span", key, label), tag("b", f"{score:.2f}"), bar, class_=f"score {kind}")


def _thumbnail(each: Shown) -> Html:
  try:
    if each.overlay:
      image_hwc = np.asarray(pictures.read_rgb(each.overlay.path))[:each.overlay.height]
    else:
      image_hwc = np.asarray(pictures.read_rgb(pathlib.Path(each.file), LONGEST))
  except ValueError:  # it was tagged by an earlier run, and has gone since
    return tag("span", "cannot be read now", class_="soft")
  tiny = max(image_hwc.shape) <= TINY
  source = report_parts.data_uri(image_hwc, LONGEST, "png" if tiny else "jpeg")
  return Html(tag("img", src=source, alt=", ".join(each.tags), loading="lazy", class_="pixels" if tiny else None)
              .removesuffix("</img>"))
