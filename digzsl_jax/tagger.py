"""TagCLIP over many pictures: decoded in threads, padded to few shapes, batched, divided over the local devices.

Two compiled calls for each padded shape, `_first` (coarse scores, refinement, candidates) and `_second` (crops), and
between them one visit to the host, which lists the candidates. These wait until they fill a group, whichever picture of
the bucket they are of; their pictures wait with them, as bytes and at most a group and a batch of them.

Memory of a device in `_first`, beside weights, is for each of its pictures, N patches after padding, one layer's
activations, about `4 N (intermediate_size + 5 hidden_size)` bytes, and about `20 N^2` of `tagclip.scores_and_affinity`:
of ViT-B/16 in float32 45 MiB at 480x640 and 67 MiB at 640x640, as compiled for a CPU. In `_second` it is 11 MiB a crop.

A row of either call is at the same place of a body of the same size whatever the number of devices, so results do not
depend on it, bit for bit.

Shapes: b picture of a batch, n candidate, i j height and width in pixels or patches, c colours, f labels, k classes:
labels, then background, p width of the shared space.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.data.native import Bucket, Native
from digzsl_jax.models import tagclip
from digzsl_jax.models.cdm import Preprocess
from digzsl_jax.models.clip import CLIPModel

AHEAD = 2  # batches that are read while one is computed
AXIS = "picture"  # over which batches and groups are divided among devices
ROWS, ALL = jax.sharding.PartitionSpec(AXIS), jax.sharding.PartitionSpec()


class Rules(NamedTuple):
  """The choices of `tagclip.refine` and `tagclip.propose`; published for VOC and COCO are the defaults."""

  first_layer: int = 8
  votes: int = 4
  threshold: float = 0.5
  compat: bool = False


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


class _Static(NamedTuple):
  """What compiled calls are specialised for, beside shapes."""

  graphdef: nnx.GraphDef
  mesh: jax.sharding.Mesh
  preprocess: Preprocess
  labels: int
  rules: Rules


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
    layers, width = len(model.vision_model.encoder.layers), model.visual_projection.out_features
    if text_kp.ndim != 2 or text_kp.shape[1] != width or not 0 < labels <= len(text_kp):
      raise ValueError(f"texts {list(text_kp.shape)} with {labels} labels do not fit a model of width {width}")
    tagclip.check(layers, rules.first_layer, rules.votes)
    on_cpu = jax.default_backend() == "cpu"
    pictures = (1 if on_cpu else 8) if pictures is None else pictures
    crops = (4 if on_cpu else 32) if crops is None else crops
    if pictures < 1 or crops < 1:
      raise ValueError(f"pictures {pictures} and crops {crops} of a batch must be at least 1")
    graphdef, params = nnx.split(model)
    mesh = jax.sharding.Mesh(np.array(jax.local_devices() if devices is None else devices), (AXIS,))
    self.patch, self.classes = model.vision_model.embeddings.patch_size, len(text_kp)
    self.static = _Static(graphdef, mesh, preprocess, labels, rules)
    self.pictures, self.crops = pictures * mesh.size, crops * mesh.size
    self.weights = jax.device_put((params, jnp.asarray(text_kp, jnp.float32)), jax.sharding.NamedSharding(mesh, ALL))

  def stream(self, pictures: Native, buckets: Sequence[Bucket]) -> Iterator[Scored]:
    """Scores of all members of `buckets`, batch by batch in their order.

    Any object with `pixels(row)`, uint8 RGB of at most the bucket's size in whole patches, will do for `pictures`. It
    is called in threads.

    Raises:
      ValueError: as `pixels` does; what came before can still be asked for in another call.
    """
    jobs = ((bucket, bucket.members[start:start + self.pictures])
            for bucket in buckets for start in range(0, len(bucket.members), self.pictures))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as readers:
      read = lambda job: (*job, [readers.submit(pictures.pixels, int(row)) for row in job[1]])
      reading = collections.deque(map(read, itertools.islice(jobs, AHEAD)))
      line = _Line(self)
      try:
        while reading:
          bucket, rows_b, images = reading.popleft()
          images = [image.result() for image in images]
          reading.extend(map(read, itertools.islice(jobs, 1)))
          yield from line.push(bucket, rows_b, images)
        yield from line.finish()
      finally:
        readers.shutdown(wait=False, cancel_futures=True)

  def first(self, images_bijc: np.ndarray, grids_b2: np.ndarray) -> _Found:
    """Starts `_first` for a full batch."""
    return _first(self.static, self.weights, *self._place(images_bijc, grids_b2))

  def second(self, *group) -> jax.Array:
    """Starts `_second` for a full group."""
    return _second(self.static, self.weights, *self._place(*group))

  def _place(self, *arrays):
    return jax.device_put(arrays, jax.sharding.NamedSharding(self.static.mesh, ROWS))


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
    size, patch = self.tagger.pictures, self.tagger.patch
    images_bijc = np.zeros((size, bucket.rows * patch, bucket.columns * patch, 3), np.uint8)
    grids_b2 = np.ones((size, 2), np.int32)  # what fills a batch up is one black patch
    for place, image in enumerate(images):
      height, width = image.shape[:2]
      images_bijc[place, :height, :width] = image
      grids_b2[place] = height // patch, width // patch
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
def _first(static: _Static, weights, images_bijc: jax.Array, grids_b2: jax.Array) -> _Found:
  rules = static.rules

  def body(weights, images_bijc, grids_b2):
    model, text_kp = _merged(static, weights)
    scores_bijk, affinity_blm = tagclip.scores_and_affinity(
        model, _normalised(static, images_bijc), grids_b2, text_kp, first_layer=rules.first_layer, votes=rules.votes)
    refined_bijk = tagclip.spread(scores_bijk, affinity_blm, grids_b2, compat=rules.compat)
    proposals = tagclip.propose(refined_bijk, grids_b2, static.labels, threshold=rules.threshold, compat=rules.compat)
    return _Found(tagclip.best_patch(scores_bijk[..., :static.labels], grids_b2), proposals)

  return _divided(static, body)(weights, images_bijc, grids_b2)


@functools.partial(jax.jit, static_argnums=0)
def _second(static: _Static, weights, images_nijc: jax.Array, masks_nij: jax.Array, boxes_n4: jax.Array,
            label_n: jax.Array) -> jax.Array:
  def body(weights, images_nijc, *group):
    model, text_kp = _merged(static, weights)
    return tagclip.look(model, _normalised(static, images_nijc), *group, text_kp)

  return _divided(static, body)(weights, images_nijc, masks_nij, boxes_n4, label_n)


def _divided(static: _Static, body):
  """`body` on every device's rows, with all weights."""
  def divided(weights, *arrays):
    specs = (ALL, *[ROWS] * len(arrays))
    return jax.shard_map(body, mesh=static.mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(weights, *arrays)
  return divided


def _merged(static: _Static, weights) -> tuple[CLIPModel, jax.Array]:
  params, text_kp = weights
  return nnx.merge(static.graphdef, params), text_kp


def _normalised(static: _Static, images_bijc: jax.Array) -> jax.Array:
  """As the checkpoint's `preprocessor_config.json` says, float32 from bytes."""
  mean_c, std_c = (np.array(values, np.float32) for values in (static.preprocess.mean, static.preprocess.std))
  return (images_bijc.astype(jnp.float32) / 255 - mean_c) / std_c
