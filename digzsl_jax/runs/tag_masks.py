"""Masks of the tags that stage tags gave: classify, then segment (CLS-SEG, arXiv 2312.12828; CLIP-ES, 2212.09506).

Leaves `labels/<picture>.png`, 0 for background and column + 1 for a label, with `labels.txt` to name them; on request
`overlays/<picture>.png`; and `manifest.json`. A picture whose files are there is not done again.

Shapes: n test picture, f label, k class: labels, then background, m tag of a picture, h w pixel.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import pathlib

import numpy as np

from digzsl_jax import files, mask_files
from digzsl_jax.base_workspace import check
from digzsl_jax.data import images, label_lists, native, prompts
from digzsl_jax.models import cls_seg
from digzsl_jax.segmenter import Cams, MaskRules, Segmenter
from digzsl_jax.tag_workspace import TagWorkspace

NEEDS = ("tags",)
MODELS = ("clip", "texts")
WAITING = 64  # pictures whose files may wait to be written


@dataclasses.dataclass(frozen=True)
class Settings:
  """How masks are made. Published values are for CLIP ViT-B/16 with its 12 layers.

  Attributes:
    first_layer: attention is averaged from this layer: published 4.
    last_layer: to this one: published 10 for VOC, 11 for COCO and COCO-Stuff.
    threshold: of boxes around what is found: published 0.4 for VOC, 0.7 for COCO and COCO-Stuff.
    compat: as in `cls_seg`.
    names: list of `label_lists.CLS_SEG` whose names stand for the labels here; "" for those of the tags.
    background: list of `label_lists.CLS_SEG` whose background takes part in the softmax; "" for that of the tags.
    template: as in `tag_workspace.ModelSettings`: published "origami".
    unlabelled: whether a pixel may show no label (1 less the highest map): published for VOC and COCO.
    crf: whether a CRF refines the masks; needs `pip install 'digzsl_jax[crf]'`.
    overlays: whether pictures are written with their masks over them.
    pictures: that a device takes at a time.
    pairs: of a picture and a tag, that a call has room for, for each picture: more only make it longer.
  """

  first_layer: int
  last_layer: int
  threshold: float
  compat: bool
  names: str
  background: str
  template: str
  unlabelled: bool
  crf: bool
  overlays: bool
  pictures: int
  pairs: int

  def __post_init__(self):
    check(0 <= self.threshold < 1, "threshold", self.threshold, "at least 0 and below 1")
    for field in ("names", "background"):
      check(getattr(self, field) in ("", *label_lists.CLS_SEG), field, getattr(self, field),
            f'"" or one of {list(label_lists.CLS_SEG)}')
    for field in ("pictures", "pairs"):
      check(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
    prompts.templates(self.template, field="template")

  @property
  def rules(self) -> MaskRules:
    return MaskRules(self.first_layer, self.last_layer, self.threshold, self.compat)


def validate(settings: Settings, ws: TagWorkspace) -> None:
  """Raises ValueError if the model has other layers, a list does not fit, or the CRF is not installed."""
  cls_seg.check(ws.layers, settings.first_layer, settings.last_layer)
  if settings.names:
    ws.listed(settings.names, "masks.names", label_lists.CLS_SEG)
  if settings.crf:
    mask_files.check_crf()


def run(settings: Settings, ws: TagWorkspace, folder: pathlib.Path) -> dict:
  """Makes the masks of all test pictures."""
  tags_nf = ws.tags(ws.scores()["tagclip"])
  pictures, writer = ws.pictures(ws.config["tags"]["most_patches"]), Writer(settings, ws, folder)
  left = np.array([row for row in range(len(pictures)) if not writer.has(row)], np.int64)
  buckets = [bucket._replace(members=bucket.members[np.isin(bucket.members, left)])
             for bucket in native.plan(pictures.grids_n2, ws.config["tags"]["buckets"])]
  if len(left):
    segmenter = Segmenter(ws.clip, ws.preprocess, texts(settings, ws), len(ws.names), settings.rules,
                          pictures=settings.pictures, pairs=settings.pairs, devices=ws.mesh.local_devices)
    with ws.log.progress(len(pictures), "masks", len(pictures) - len(left)) as bar:
      for done in writer.write(segmenter.stream(pictures, buckets, tags_nf), pictures):
        bar.update(done)
  files.write_text(folder / "labels.txt", "".join(f"{k + 1} {name}\n" for k, name in enumerate(ws.dataset.names)))
  listed = {"masks": writer.masks, **({"overlays": writer.overlays} if settings.overlays else {})}
  files.write_json(folder / "manifest.json", listed)
  return {"pictures": len(pictures), "tags": int(tags_nf.sum())}


def texts(settings: Settings, ws: TagWorkspace) -> np.ndarray:
  """Unit embeddings `[k, p]` of labels and background, as masks are told of them."""
  names = ws.listed(settings.names, "masks.names", label_lists.CLS_SEG) if settings.names else ws.names
  background = label_lists.CLS_SEG[settings.background].background if settings.background else ws.background
  templates = prompts.templates(settings.template, field="template")
  return ws.embed_labels((*names, *prompts.beside(background, names)), templates)


class Writer:
  """Files of masks, written in threads while others are computed.

  Attributes:
    masks: path of each picture's labels, relative to the folder.
    overlays: likewise.
  """

  def __init__(self, settings: Settings, ws: TagWorkspace, folder: pathlib.Path):
    stems = picture_names(ws)
    self.settings, self.folder, self.names = settings, folder, ws.dataset.names
    self.masks, self.overlays = ([f"{kind}/{stem}.png" for stem in stems] for kind in ("labels", "overlays"))
    self.palette_vc = mask_files.palette(len(self.names) + 1)

  def has(self, row: int) -> bool:
    """Whether all files of a picture are there."""
    wanted = [self.masks[row], *([self.overlays[row]] if self.settings.overlays else [])]
    return all((self.folder / path).exists() for path in wanted)

  def write(self, found, pictures: native.Native):
    """Yields how many pictures were finished since."""
    writing = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
      for cams in found:
        writing.append(threads.submit(functools.partial(self.one, cams, pictures)))
        while len(writing) > WAITING or writing and writing[0].done():
          writing.popleft().result()
          yield 1
      for future in writing:
        future.result()
        yield 1

  def one(self, cams: Cams, pictures: native.Native) -> None:
    """The files of one picture, its labels last: they say that it is finished."""
    image_hwc = pictures.shown(cams.row) if self.settings.overlays or self.settings.crf else None
    labels_hw = mask_files.labels_of(cams.cams_mij, cams.labels_m, tuple(pictures.sizes_n2[cams.row].tolist()),
                                     self.settings.unlabelled, image_hwc if self.settings.crf else None)
    if self.settings.overlays:
      images.write_png(self.folder / self.overlays[cams.row],
                       mask_files.overlay(image_hwc, labels_hw, self.names, self.palette_vc))
    mask_files.write_palette_png(self.folder / self.masks[cams.row], labels_hw, self.palette_vc)


def picture_names(ws: TagWorkspace) -> list[str]:
  """Of every test picture a name for its files: its own path without suffix, or its number."""
  found = ws.dataset.test.images_nhwc
  if isinstance(found, np.ndarray):
    return [f"{row:06d}" for row in range(len(found))]
  stems = [str(pathlib.PurePosixPath(file.path).with_suffix("")) for file in found.files]
  twice = {stem for stem, count in collections.Counter(stems).items() if count > 1}  # a.jpg and a.png
  return [file.path if stem in twice else stem for file, stem in zip(found.files, stems)]
