"""What engines over pictures of their own sizes share: reading ahead, padding, and division over the local devices.

An engine is compiled calls `call(static, weights, *arrays)` whose arrays have as many rows on every device; `divided`
makes them of a body for one device. A row is at the same place of a body of the same size whatever the number of
devices, so results do not depend on it, bit for bit.

Shapes: b picture of a batch, i j height and width in pixels, c colours, k classes: labels, then background, p width of
the shared space.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.data.native import Bucket, Native
from digzsl_jax.models.cdm import Preprocess
from digzsl_jax.models.clip import CLIPModel

AHEAD = 2  # batches that are read while one is computed
AXIS = "picture"  # over which batches and groups are divided among devices
ROWS, ALL = jax.sharding.PartitionSpec(AXIS), jax.sharding.PartitionSpec()


class Static(NamedTuple):
  """What compiled calls are specialised for, beside shapes; `rules` are the engine's own."""

  graphdef: nnx.GraphDef
  mesh: jax.sharding.Mesh
  preprocess: Preprocess
  labels: int
  rules: NamedTuple


def prepare(model: CLIPModel, preprocess: Preprocess, text_kp: np.ndarray, labels: int, rules: NamedTuple,
            devices: Sequence[jax.Device] | None) -> tuple[Static, tuple[nnx.State, jax.Array]]:
  """The first arguments of compiled calls: `(static, weights)`, the second on all devices.

  Args:
    preprocess: its mean and std are used: pictures keep their size.
    text_kp: embeddings of labels and background, of length 1.
    labels: so many of the classes, the first ones, are no background.
    devices: None for all of this process.

  Raises:
    ValueError: sizes that do not fit each other or the model.
  """
  width = model.visual_projection.out_features
  if text_kp.ndim != 2 or text_kp.shape[1] != width or not 0 < labels <= len(text_kp):
    raise ValueError(f"texts {list(text_kp.shape)} with {labels} labels do not fit a model of width {width}")
  graphdef, params = nnx.split(model)
  mesh = jax.sharding.Mesh(np.array(jax.local_devices() if devices is None else devices), (AXIS,))
  weights = jax.device_put((params, jnp.asarray(text_kp, jnp.float32)), jax.sharding.NamedSharding(mesh, ALL))
  return Static(graphdef, mesh, preprocess, labels, rules), weights


def read_ahead(pictures: Native, jobs: Iterable[tuple]) -> Iterator[tuple[tuple, list[np.ndarray]]]:
  """Yields each job, a tuple whose first part is the rows of its pictures, and their pixels.

  Any object with `pixels(row)` will do for `pictures`. It is called in threads, which end when this is closed.

  Raises:
    ValueError: as `pixels` does, when it is that job's turn.
  """
  jobs = iter(jobs)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as readers:
    read = lambda job: (job, [readers.submit(pictures.pixels, int(row)) for row in job[0]])
    reading = collections.deque(map(read, itertools.islice(jobs, AHEAD)))
    try:
      while reading:
        job, images = reading.popleft()
        images = [image.result() for image in images]
        reading.extend(map(read, itertools.islice(jobs, 1)))
        yield job, images
    finally:
      readers.shutdown(wait=False, cancel_futures=True)


def padded(images: Sequence[np.ndarray], size: int, bucket: Bucket, patch: int) -> tuple[np.ndarray, np.ndarray]:
  """A batch of `size` pictures, `(images_bijc, grids_b2)`; what fills it up is one black patch each."""
  images_bijc = np.zeros((size, bucket.rows * patch, bucket.columns * patch, 3), np.uint8)
  grids_b2 = np.ones((size, 2), np.int32)
  for place, image in enumerate(images):
    height, width = image.shape[:2]
    images_bijc[place, :height, :width] = image
    grids_b2[place] = height // patch, width // patch
  return images_bijc, grids_b2


def place(static: Static, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
  """Divides the rows of `arrays` among the devices."""
  return jax.device_put(list(arrays), jax.sharding.NamedSharding(static.mesh, ROWS))


def divided(static: Static, body: Callable) -> Callable:
  """`body` on every device's rows, with all weights."""
  def call(weights, *arrays):
    specs = (ALL, *[ROWS] * len(arrays))
    return jax.shard_map(body, mesh=static.mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(weights, *arrays)
  return call


def merged(static: Static, weights) -> tuple[CLIPModel, jax.Array]:
  """The model and the texts."""
  params, text_kp = weights
  return nnx.merge(static.graphdef, params), text_kp


def normalised(static: Static, images_bijc: jax.Array) -> jax.Array:
  """As the checkpoint's `preprocessor_config.json` says, float32 from bytes."""
  mean_c, std_c = (np.array(values, np.float32) for values in (static.preprocess.mean, static.preprocess.std))
  return (images_bijc.astype(jnp.float32) / 255 - mean_c) / std_c
