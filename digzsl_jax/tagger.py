"""TagCLIP over many pictures: decoded in threads, padded to few shapes, batched, divided over the local devices.

Two compiled calls for each padded shape, `_first` (coarse scores, refinement, candidates) and `_second` (crops), and
between them one visit to the host, which lists the candidates. These wait until they fill a group, whichever picture of
the bucket they are of; their pictures wait with them, as bytes and at most a group and a batch of them.

Memory of a device in `_first`, beside weights, is for each of its pictures, N patches after padding, one layer's
activations, about `4 N (intermediate_size + 5 hidden_size)` bytes, and about `20 N^2` of `tagclip.scores_and_affinity`:
of ViT-B/16 in float32 some 50 MiB at 480x640 and 75 MiB at 640x640, as compiled for a CPU. In `_second` it is 11 MiB a
crop.

Shapes: b picture of a batch, n candidate, i j height and width in pixels or patches, c colours, f labels, k classes:
labels, then background, p width of the shared space.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from digzsl_jax import native_batches
from digzsl_jax.data.native import Bucket, Native
from digzsl_jax.models import affinity, tagclip
from digzsl_jax.models.cdm import Preprocess
from digzsl_jax.models.clip import CLIPModel


class Rules(NamedTuple):
  """The choices of `tagclip.refine` and `tagclip.propose`; published for VOC and COCO are the defaults."""

  first_layer: int = 8
  votes: int = 4
  threshold: float = 0.5
  compat: bool = False

  @classmethod
  def for_layers(cls, layers: int, threshold: float = 0.5, compat: bool = False) -> "Rules":
    """First layer and votes in proportion to a model's layers; for 12 alone they are published, and there the same."""
    first = max(min(round(8 / 12 * layers), layers - 2), 0)  # at least one layer is averaged
    return cls(first, max(round(4 / 12 * layers), 1), threshold, compat)


class Scored(NamedTuple):
  """One batch of pictures.

  Attributes:
    rows_b: which pictures.
    patch_bf: of every label the best patch of the coarse scores.
    refined_bf: the same of the refined scores.
    scores_bf: the scores of TagCLIP, `refined_bf` but where a second look was had.
    looks: how many second looks there were.
  """

  rows_b: np.ndarray
  patch_bf: np.ndarray
  refined_bf: np.ndarray
  scores_bf: np.ndarray
  looks: int


class _Found(NamedTuple):
  """What `_first` puts out."""

  patch_bf: jax.Array
  proposals: tagclip.Proposals


@dataclasses.dataclass
class _Batch:
  """A batch whose scores are not final."""

  scored: Scored
  waiting: int  # candidates without a result


class _Candidate(NamedTuple):
  """A label of a picture that waits for its second look."""

  batch: _Batch
  place: tuple[int, int]  # in its `scores_bf`
  image_ijc: np.ndarray
  mask_ij: np.ndarray
  box_4: np.ndarray


class Tagger:
  """TagCLIP with one model, one set of texts and one set of rules."""

  def __init__(self, model: CLIPModel, preprocess: Preprocess, text_kp: np.ndarray, labels: int, rules: Rules, *,
               pictures: int | None = None, crops: int | None = None, devices: Sequence[jax.Device] | None = None):
    """
    Args:
      preprocess: its mean and std are used: pictures keep their size.
      text_kp: embeddings of labels and background, of length 1.
      labels: so many of the classes, the first ones, are no background.
      pictures: that a device takes at a time; None for 1 on a CPU, where more are no faster, and 8 elsewhere.
      crops: likewise; None for 4 and 32.
      devices: all of this process by default.

    Raises:
      ValueError: sizes that do not fit each other or the model.
    """
    layers = len(model.vision_model.encoder.layers)
    affinity.check(layers, rules.first_layer, rules.votes)
    on_cpu = jax.default_backend() == "cpu"
    pictures = (1 if on_cpu else 8) if pictures is None else pictures
    crops = (4 if on_cpu else 32) if crops is None else crops
    if pictures < 1 or crops < 1:
      raise ValueError(f"pictures {pictures} and crops {crops} of a batch must be at least 1")
    self.static, self.weights = native_batches.prepare(model, preprocess, text_kp, labels, rules, devices)
    self.patch = model.vision_model.embeddings.patch_size
    self.pictures, self.crops = (size * self.static.mesh.size for size in (pictures, crops))

  def stream(self, pictures: Native, buckets: Sequence[Bucket]) -> Iterator[Scored]:
    """Scores of all members of `buckets`, batch by batch in their order.

    Any object with `pixels(row)`, uint8 RGB of at most the bucket's size in whole patches, will do for `pictures`. It
    is called in threads.

    Raises:
      ValueError: as `pixels` does; what came before can still be asked for in another call.
    """
    jobs = ((bucket.members[start:start + self.pictures], bucket)
            for bucket in buckets for start in range(0, len(bucket.members), self.pictures))
    line = _Line(self)
    with contextlib.closing(native_batches.read_ahead(pictures, jobs)) as reading:
      for (rows_b, bucket), images in reading:
        yield from line.push(bucket, rows_b, images)
    yield from line.finish()

  def first(self, images_bijc: np.ndarray, grids_b2: np.ndarray) -> _Found:
    """Starts `_first` for a full batch."""
    return _first(self.static, self.weights, *native_batches.place(self.static, (images_bijc, grids_b2)))

  def second(self, *group) -> jax.Array:
    """Starts `_second` for a full group."""
    return _second(self.static, self.weights, *native_batches.place(self.static, group))


class _Line:
  """Batches between their first call and their result."""

  def __init__(self, tagger: Tagger):
    self.tagger, self.bucket = tagger, None
    self.started = None  # the batch in `_first`: its rows and pictures, and what comes out
    self.batches = collections.deque()  # settled, not given out yet
    self.queue = []  # candidates that are in no group yet
    self.looking = collections.deque()  # groups in `_second`

  def push(self, bucket: Bucket, rows_b: np.ndarray, images: Sequence[np.ndarray]) -> Iterator[Scored]:
    """Starts a batch, then sees to the one before it while that is computed."""
    if bucket is not self.bucket:
      self._settle()
      self._look(whole_groups=False)  # a group is of one shape
      self.bucket = bucket
    images_bijc, grids_b2 = native_batches.padded(images, self.tagger.pictures, bucket, self.tagger.patch)
    started, before = (rows_b, images_bijc, self.tagger.first(images_bijc, grids_b2)), len(self.looking)
    self._settle()
    self.started = started
    yield from self._fetch(before)  # those behind are computed after the new batch

  def finish(self) -> Iterator[Scored]:
    """What is left."""
    self._settle()
    self._look(whole_groups=False)
    yield from self._fetch(len(self.looking))

  def _settle(self) -> None:
    """Waits for the first call of a batch, lists its candidates and starts the groups that are full."""
    if not self.started:
      return
    (rows_b, images_bijc, found), self.started = self.started, None
    patch_bf, (refined_bf, candidates_bf, masks_bijf, boxes_bf4) = jax.tree.map(
        lambda x: np.asarray(x)[:len(rows_b)], tuple(found))
    places = [tuple(place) for place in np.argwhere(candidates_bf).tolist()]
    batch = _Batch(Scored(rows_b, patch_bf, refined_bf, refined_bf.copy(), len(places)), len(places))
    kept = {b: images_bijc[b].copy() for b, _ in places}  # so that the rest of the batch need not wait with them
    self.queue += [_Candidate(batch, (b, f), kept[b], masks_bijf[b, ..., f].copy(), boxes_bf4[b, f]) for b, f in places]
    self.batches.append(batch)
    self._look(whole_groups=True)

  def _look(self, whole_groups: bool) -> None:
    size = self.tagger.crops
    while len(self.queue) >= size or self.queue and not whole_groups:
      group, self.queue = self.queue[:size], self.queue[size:]
      filled = group + group[-1:] * (size - len(group))
      label_n = np.array([f for _, f in (each.place for each in filled)], np.int32)
      arrays = (np.stack([getattr(each, name) for each in filled]) for name in ("image_ijc", "mask_ij", "box_4"))
      self.looking.append((group, self.tagger.second(*arrays, label_n)))

  def _fetch(self, groups: int) -> Iterator[Scored]:
    """Takes the results of the first `groups` in and gives out the batches that are final, in order."""
    for _ in range(groups):
      group, probability_n = self.looking.popleft()
      for (batch, place, *_), probability in zip(group, np.asarray(probability_n)):
        batch.scored.scores_bf[place] = (batch.scored.refined_bf[place] + probability) / 2
        batch.waiting -= 1
    while self.batches and not self.batches[0].waiting:
      yield self.batches.popleft().scored


@functools.partial(jax.jit, static_argnums=0)  # outside of `Tagger`, so that a second one compiles nothing
def _first(static: native_batches.Static, weights, images_bijc: jax.Array, grids_b2: jax.Array) -> _Found:
  rules = static.rules

  def body(weights, images_bijc, grids_b2):
    model, text_kp = native_batches.merged(static, weights)
    scores_bijk, affinity_blm = tagclip.scores_and_affinity(
        model, native_batches.normalised(static, images_bijc), grids_b2, text_kp, first_layer=rules.first_layer,
        votes=rules.votes)
    refined_bijk = tagclip.spread(scores_bijk, affinity_blm, grids_b2, compat=rules.compat)
    proposals = tagclip.propose(refined_bijk, grids_b2, static.labels, threshold=rules.threshold, compat=rules.compat)
    return _Found(tagclip.best_patch(scores_bijk[..., :static.labels], grids_b2), proposals)

  return native_batches.divided(static, body)(weights, images_bijc, grids_b2)


@functools.partial(jax.jit, static_argnums=0)
def _second(static: native_batches.Static, weights, images_nijc: jax.Array, masks_nij: jax.Array, boxes_n4: jax.Array,
            label_n: jax.Array) -> jax.Array:
  def body(weights, images_nijc, *group):
    model, text_kp = native_batches.merged(static, weights)
    return tagclip.look(model, native_batches.normalised(static, images_nijc), *group, text_kp)

  return native_batches.divided(static, body)(weights, images_nijc, masks_nij, boxes_n4, label_n)
