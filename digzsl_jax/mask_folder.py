"""Masks of the tags that `digzsl_jax.tag` gave: classify, then segment (CLS-SEG, `segmenter.py`), a file a picture.

A folder gets `<name>.png`, 0 for background and k + 1 for label k, which `labels.txt` names, and `<name>.overlay.png`,
the picture under its masks. A name is the picture's path below the folder that all have in common, without suffix where
that leaves it unique. `masks.jsonl` says what is finished.

Shapes: n picture, f label, h w pixel.
"""

import collections
import concurrent.futures
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from digzsl_jax import files, mask_files
from digzsl_jax.contact_sheet import Overlay
from digzsl_jax.data import images, label_lists, native, prompts
from digzsl_jax.segmenter import Cams, MaskRules
from digzsl_jax.tag_records import Records, state

WAITING = 32  # pictures whose files may wait to be written
MOST_PIXELS = 2**22  # of maps, which know no more than patches; masks of larger pictures are enlarged
OVERLAY = 1280  # most pixels of its longer side
TWELVE = {"voc": MaskRules(4, 10, 0.4)}  # published for a model of 12 layers
OTHERS = MaskRules(4, 11, 0.7)  # for COCO and COCO-Stuff
COVERED = ("coco_stuff",)  # lists that have a label for every pixel


def names(listed: str | None, labels: Sequence[str], background: Sequence[str] | None) -> tuple[str, ...]:
  """Labels and background as prompts for masks have them.

  Args:
    listed: a list of `label_lists.CLS_SEG`, whose names are published, or anything else.
    labels: where it is none.
    background: None for that of the list.
  """
  known = label_lists.CLS_SEG.get(listed, label_lists.LabelList(tuple(labels), ()))
  return (*known.names, *prompts.beside(known.background if background is None else background, known.names))


def rules(listed: str | None, layers: int, compat: bool) -> MaskRules:
  """Layers in proportion to those of a model; for 12 alone they are published, and for other lists than ours not."""
  known = TWELVE.get(listed, OTHERS)
  first, end = (round(layer / 12 * layers) for layer in (known.first_layer, known.last_layer + 1))
  return MaskRules(first, end - 1, known.threshold, compat)


def stems(paths: Sequence[pathlib.Path]) -> list[str]:
  """Of every picture a name for its files, no two of which are the same."""
  whole = [os.path.abspath(path) for path in paths]
  common = os.path.commonpath([os.path.dirname(path) for path in whole])
  whole = [os.path.relpath(path, common) for path in whole]
  short = [os.path.splitext(path)[0] for path in whole]
  twice = {stem for stem, count in collections.Counter(short).items() if count > 1}  # a.jpg and a.png
  mixed = [path if stem in twice else stem for path, stem in zip(whole, short)]
  made = [name for stem in mixed for name in (f"{stem}.png", f"{stem}.overlay.png")]
  return mixed if len(set(made)) == len(made) else whole


class Masks:
  """The folder of masks of some pictures.

  Attributes:
    labels: columns of masks.
    wrong: what is wrong with pictures that could not be read again, by file.
  """

  def __init__(self, folder: pathlib.Path, settings: dict, paths: Sequence[pathlib.Path], labels: Sequence[str],
               unlabelled: bool, crf: bool):
    """Takes the folder.

    Args:
      settings: what masks depend on beside pictures.
      paths: the pictures.

    Raises:
      ValueError: masks would go over pictures, other files stand there, or there is no CRF.
      OSError: the folder cannot be written.
    """
    if crf:  # says at once whether it is installed
      mask_files.check_crf()
    self.folder, self.labels, self.unlabelled, self.crf = folder, labels, unlabelled, crf
    self.stem = dict(zip(map(str, paths), stems(paths)))
    self.wrong = {}
    given = {os.path.realpath(path) for path in paths}
    for stem in self.stem.values():
      for path in (self.mask(stem), self.overlay(stem)):
        if os.path.realpath(path) in given or path.exists() and not Records.any_in(folder, "masks"):
          raise ValueError(f"{path} is there, and is no mask of this command: choose another --masks")
    self.records = Records(folder, settings, stem="masks", flag="--masks")
    self.palette_vc = mask_files.palette(max(mask_files.BYTES, len(labels) + 1))
    files.write_text(folder / "labels.txt", "".join(
        f"{k} {name}\n" for k, name in enumerate(("background", *labels))))

  def mask(self, stem: str) -> pathlib.Path:
    return self.folder / f"{stem}.png"

  def overlay(self, stem: str) -> pathlib.Path:
    return self.folder / f"{stem}.overlay.png"

  def shown(self, file: str) -> Overlay | None:
    """The overlay of a picture, where it is made."""
    path = self.overlay(self.stem[file])
    if file not in self.records.done or not path.exists():
      return None
    colours = {label: "#" + self.palette_vc[k + 1].tobytes().hex() for k, label in enumerate(self.labels)}
    return Overlay(path, self.records.done[file]["overlay_height"], colours)

  def begin(self, paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Those of `paths` without masks."""
    return self.records.begin(paths, lambda record: record["mask"] == f"{self.stem[record['file']]}.png" and
                              self.mask(self.stem[record["file"]]).exists())

  def write(self, found: Iterator[Cams], read: native.Native, paths: Sequence[pathlib.Path],
            progress: Callable[[int], object]) -> None:
    """Writes files in threads while maps are computed.

    Args:
      found: maps; their rows are those of `read` and `paths`.
      progress: told how many pictures were finished since.
    """
    states = [state(path) for path in paths]

    def finish(row: int, future: concurrent.futures.Future) -> None:
      path = paths[row]
      try:
        height, stem = future.result(), self.stem[str(path)]
        self.records.add([{"file": str(path), "bytes": states[row][0], "modified": states[row][1],
                           "mask": f"{stem}.png", "overlay": f"{stem}.overlay.png", "overlay_height": height}])
      except ValueError as error:
        self.wrong[str(path)] = str(error)
      progress(1)

    writing = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
      for cams in found:
        writing.append((cams.row, threads.submit(self._one, cams, read, self.stem[str(paths[cams.row])])))
        while len(writing) > WAITING or writing and writing[0][1].done():
          finish(*writing.popleft())
      for waiting in writing:
        finish(*waiting)

  def _one(self, cams: Cams, read: native.Native, stem: str) -> int:
    """The files of one picture; returns the height of the overlay without its legend."""
    image = Image.fromarray(read.shown(cams.row))
    scale = min(1, math.sqrt(MOST_PIXELS / (image.width * image.height)))
    small = image if scale == 1 else image.resize([max(1, int(scale * side)) for side in image.size])
    labels_hw = mask_files.labels_of(cams.cams_mij, cams.labels_m, small.size[::-1], self.unlabelled,
                                     np.asarray(small) if self.crf else None)
    picture = image.copy()
    picture.thumbnail((OVERLAY, OVERLAY))
    overlay_hwc = mask_files.overlay(np.asarray(picture), _nearest(labels_hw, picture.size), self.labels,
                                     self.palette_vc)
    images.write_png(self.overlay(stem), overlay_hwc)
    mask_files.write_palette_png(self.mask(stem), _nearest(labels_hw, image.size), self.palette_vc)
    return picture.height * (overlay_hwc.shape[1] // picture.width)  # a small picture is enlarged there


def _nearest(labels_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A map of labels in another size (width, height)."""
  rows_h, columns_w = (np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
                       for new, old in zip(size[::-1], labels_hw.shape))
  return labels_hw[rows_h[:, None], columns_w]
