"""CLS-SEG over many pictures: maps of the labels said of each, by `models.cls_seg`.

One compiled call for each padded shape. What labels a picture has is known before it is read, so pictures with as many
go together, and the call makes the map of every picture's first label, then of every second one, and so on, as many
times as its pictures have labels. So nothing has to live on a device between two calls, and no map needs anything of
another device.

Memory of a device in a call, beside weights and maps: for each of its `pictures` of N patches 4 bytes times the larger
of 9 (N + 1) intermediate_size + 2 N^2, for the way back, and 6 N^2, for attention. Of ViT-B/16 and 40 x 40 patches that
is 175 MiB, as compiled for a CPU. Labels, heads and layers do not count.

Shapes: b picture of a batch, f labels, s the labels of a picture in one call, m all labels of a picture, i j its rows
and columns of patches, l patches, k classes: labels, then background, p width of the shared space.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax import native_batches
from digzsl_jax.data.native import Bucket, Native
from digzsl_jax.models import cls_seg, tagclip
from digzsl_jax.models.cdm import Preprocess
from digzsl_jax.models.clip import CLIPModel


class MaskRules(NamedTuple):
  """The choices of `cls_seg.affinity` and `cls_seg.refine`; published for VOC is last_layer 10, threshold 0.4."""

  first_layer: int = 4
  last_layer: int = 11
  threshold: float = 0.4
  compat: bool = False


class Cams(NamedTuple):
  """Maps of a picture, of its own patches.

  Attributes:
    row: which picture.
    labels_m: columns of its labels, ascending.
    cams_mij: float32, 0 to 1 in each map, spread by affinity.
    raw_mij: the same before that.
  """

  row: int
  labels_m: np.ndarray
  cams_mij: np.ndarray
  raw_mij: np.ndarray


class _Job(NamedTuple):
  """Some labels of a batch of pictures."""

  rows_b: list[int]
  labels_b: list[np.ndarray]
  bucket: Bucket


class Segmenter:
  """CLS-SEG with one model, one set of texts and one set of rules."""

  def __init__(self, model: CLIPModel, preprocess: Preprocess, text_kp: np.ndarray, labels: int, rules: MaskRules, *,
               pictures: int = 2, pairs: int = 16, devices: Sequence[jax.Device] | None = None):
    """
    Args:
      preprocess: its mean and std are used: pictures keep their size.
      text_kp: embeddings of labels and background, of length 1.
      labels: so many of the classes, the first ones, are no background.
      pictures: that a device takes at a time.
      pairs: of a picture and a label, that a call has room for, for each picture. A picture with more labels goes
        through the model again.
      devices: all of this process by default.

    Raises:
      ValueError: sizes that do not fit each other or the model.
    """
    cls_seg.check(len(model.vision_model.encoder.layers), rules.first_layer, rules.last_layer)
    if pictures < 1 or pairs < 1:
      raise ValueError(f"pictures {pictures} of a batch and pairs {pairs} of a picture must be at least 1")
    self.static, self.weights = native_batches.prepare(model, preprocess, text_kp, labels, rules, devices)
    self.patch, self.pairs = model.vision_model.embeddings.patch_size, pairs
    self.pictures = pictures * self.static.mesh.size

  def stream(self, pictures: Native, buckets: Sequence[Bucket], tags_nf: np.ndarray) -> Iterator[Cams]:
    """Maps of all members of `buckets`: those without a label first, unread, then bucket by bucket.

    Args:
      pictures: `pixels` is called in threads.
      tags_nf: bool, the labels of every picture.

    Raises:
      ValueError: tags of another shape, or as `pixels` does; what came before can still be asked for in another call.
    """
    tags_nf = np.asarray(tags_nf, bool)
    if tags_nf.shape != (wanted := (len(pictures), self.static.labels)):
      raise ValueError(f"tags are {list(tags_nf.shape)}: they are [{wanted[0]}, {wanted[1]}], pictures and labels")
    for row in (int(row) for bucket in buckets for row in bucket.members if not tags_nf[row].any()):
      nothing = np.zeros((0, *pictures.grids_n2[row]), np.float32)
      yield Cams(row, np.zeros(0, np.int64), nothing, nothing)
    # A picture with more labels than a call has room for has its parts one after another.
    parts = []
    for part in self._parts(pictures, buckets, tags_nf):
      parts.append(part)
      if sum(len(part.labels_m) for part in parts) == tags_nf[part.row].sum():
        yield Cams(part.row, *(np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts))))
        parts = []

  def _parts(self, pictures: Native, buckets: Sequence[Bucket], tags_nf: np.ndarray) -> Iterator[Cams]:
    jobs = (job for bucket in buckets for job in self._jobs(bucket, tags_nf))
    started = None
    with contextlib.closing(native_batches.read_ahead(pictures, jobs)) as reading:
      for job, images in reading:
        # The next call is started before the maps of this one are waited for.
        started, before = (job, *self._start(job, images, tags_nf[job.rows_b])), started
        yield from _fetched(before)
    yield from _fetched(started)

  def _jobs(self, bucket: Bucket, tags_nf: np.ndarray) -> Iterator[_Job]:
    """Batches of pictures with as many labels, as far as there are, the fewest first."""
    counts_n = tags_nf[bucket.members].sum(1)
    parts = [(row, labels_m[start:start + self.pairs])
             for row in bucket.members[np.argsort(counts_n, kind="stable")].tolist()
             for labels_m in [np.flatnonzero(tags_nf[row])] for start in range(0, len(labels_m), self.pairs)]
    for start in range(0, len(parts), self.pictures):
      yield _Job(*map(list, zip(*parts[start:start + self.pictures])), bucket)

  def _start(self, job: _Job, images: Sequence[np.ndarray], tags_bf: np.ndarray) -> tuple[np.ndarray, jax.Array]:
    """Starts the call: `(grids_b2, maps)`."""
    images_bijc, grids_b2 = native_batches.padded(images, self.pictures, job.bucket, self.patch)
    labels_bs = np.zeros((self.pictures, self.pairs), np.int32)
    for labels_s, labels_m in zip(labels_bs, job.labels_b):
      labels_s[:len(labels_m)] = labels_m
    counts_b = np.zeros(self.pictures, np.int32)
    counts_b[:len(job.labels_b)] = [len(labels_m) for labels_m in job.labels_b]
    tags_bf = np.pad(tags_bf, ((0, self.pictures - len(tags_bf)), (0, 0)))
    arrays = native_batches.place(self.static, [images_bijc, grids_b2, tags_bf, labels_bs, counts_b])
    return grids_b2, _maps(self.static, self.weights, *arrays)


def _fetched(started: tuple[_Job, np.ndarray, tuple[jax.Array, jax.Array]] | None) -> Iterator[Cams]:
  """Waits for a call's maps."""
  if started:
    job, grids_b2, maps = started
    cams_bsij, raw_bsij = map(np.asarray, maps)
    for b, (row, labels_m) in enumerate(zip(job.rows_b, job.labels_b)):
      own = b, slice(len(labels_m)), slice(grids_b2[b, 0]), slice(grids_b2[b, 1])
      yield Cams(row, labels_m, cams_bsij[own], raw_bsij[own])


@functools.partial(jax.jit, static_argnums=0)  # outside of `Segmenter`, so that a second one compiles nothing
def _maps(static: native_batches.Static, weights, images_bijc: jax.Array, grids_b2: jax.Array, tags_bf: jax.Array,
          labels_bs: jax.Array, counts_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Spread and raw maps `[b, s, i, j]` of `labels_bs`, of which each picture has `counts_b`."""
  rules = static.rules

  def body(weights, images_bijc, grids_b2, tags_bf, labels_bs, counts_b):
    model, text_kp = native_batches.merged(static, weights)
    rows, columns = tagclip.grid(*images_bijc.shape[1:3], model.vision_model.embeddings.patch_size)
    hidden_bld, affinity_blm = cls_seg.features_and_affinity(
        model, native_batches.normalised(static, images_bijc), grids_b2, first_layer=rules.first_layer,
        last_layer=rules.last_layer)
    allowed_bk = jnp.pad(tags_bf, ((0, 0), (0, len(text_kp) - static.labels)), constant_values=True)
    raw_of = cls_seg.cams(model, hidden_bld, grids_b2, rows, columns, text_kp, allowed_bk)

    def one(s, maps):
      raw_bij = raw_of(labels_bs[:, s])
      cams_bij = cls_seg.refine(raw_bij, affinity_blm, grids_b2, threshold=rules.threshold, compat=rules.compat)
      return tuple(maps_bsij.at[:, s].set(map_bij) for maps_bsij, map_bij in zip(maps, (cams_bij, raw_bij)))

    empty_bsij = jnp.zeros((*labels_bs.shape, rows, columns))
    return jax.lax.fori_loop(0, counts_b.max(), one, (empty_bsij, empty_bsij))

  return native_batches.divided(static, body)(weights, images_bijc, grids_b2, tags_bf, labels_bs, counts_b)
