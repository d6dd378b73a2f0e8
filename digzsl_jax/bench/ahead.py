"""Production's compiled steps for devices that need not be there: shapes and types in place of weights and inputs.

Shapes as of `steps.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from digzsl_jax import diffusion, mesh
from digzsl_jax.bench.sizes import Place
from digzsl_jax.bench.steps import SEED, SOURCES
from digzsl_jax.models import cdm
from digzsl_jax.models.classifier import Classifier
from digzsl_jax.runs import class_tokens, classifier, generate


class Program(NamedTuple):
  """A step to be compiled.

  Attributes:
    name: of the step.
    images: that a device works on at a time.
    lower: traces it.
  """

  name: str
  images: int
  lower: Callable[[], jax.stages.Lowered]


def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Shapes and types of `tree`, over the devices of `sharding`."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def array(*shape: int, dtype=np.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def tokens(place: Place) -> list[Program]:
  """`prefix` and `learn`, a device's classes in one compiled body."""
  size, sd, devices, count = place.size, place.models.sd, place.devices, place.size.classes[0]
  settings = place.tokens()
  graphdef, params = nnx.split(class_tokens.Guide(sd, cdm.CDM(place.models.encoder, place.models.head())))
  path = class_tokens.gradient_path(settings, place.models.schedule())
  classes = class_tokens.Classes(
      array(count, dtype=np.int32), array(count, dtype=bool), array(count, size.length, dtype=np.int32),
      array(count, size.clip_config.projection_dim), array(size.length, dtype=np.int32))
  fresh = lambda start_knd: class_tokens.fresh_slots(settings, np.zeros(settings.slots), start_knd)
  slots = placed(jax.eval_shape(fresh, array(count, settings.vectors, sd.text_width)), mesh.by_class(devices))
  frozen = placed(class_tokens.Frozen(params, classes), mesh.replicated(devices))
  prefix, learn = class_tokens.compile_steps(settings, SEED, path, graphdef, devices)
  carry = lambda: placed(jax.eval_shape(prefix, frozen, slots), mesh.by_class(devices))
  images = settings.slots_per_body * settings.images
  return [Program("prefix", images, lambda: prefix.lower(frozen, slots)),
          Program("learn", images, lambda: learn.lower(frozen, slots, carry()))]


def generated(place: Place) -> list[Program]:
  """From prompts to pixels."""
  size, sd, settings = place.size, place.models.sd, place.generate()
  count = settings.batch * place.devices.size
  sampler = diffusion.make_sampler(place.models.schedule(), settings.steps, settings.sampler)
  graphdef, params = nnx.split(sd)
  number = array(count, dtype=np.int32)
  rows = placed(generate.Rows(number, number, array(count, size.length, dtype=np.int32),
                              array(count, 1, sd.text_width)), mesh.by_class(place.devices))
  frozen = placed((params, array(size.length, dtype=np.int32)), mesh.replicated(place.devices))
  sample = generate.compile_sampler(settings, SEED, sampler, graphdef, place.devices)
  return [Program("sample", settings.batch, lambda: sample.lower(frozen, rows))]


def features(place: Place) -> list[Program]:
  """Feature rows of the encoder."""
  batch, side = place.batch_of("features"), place.size.clip_config.vision_config.image_size
  devices = jax.sharding.Mesh(place.devices.devices, (cdm.AXIS,))
  over = lambda *spec: jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*spec))
  graphdef, params = nnx.split(place.models.encoder)
  images_nijc = placed(array(batch * devices.size, side, side, 3, dtype=np.uint8), over(cdm.AXIS))
  return [Program("encode", batch, lambda: cdm.encode.lower(graphdef, devices, placed(params, over()), images_nijc))]


def zero_shot(place: Place) -> list[Program]:
  """The whole training of the classifiers, which one device does."""
  size, (unseen, seen) = place.size, place.size.classes
  settings, pooled = size.classifier, size.clip_config.vision_config.hidden_size
  width = pooled + size.clip_config.projection_dim
  columns = classifier.columns(settings.features, pooled, width)
  model = nnx.eval_shape(lambda: Classifier(columns, settings.hidden, seen + unseen, rngs=nnx.Rngs(SEED)))
  graphdef, *state = nnx.split(model, nnx.Param, ...)
  train = classifier.compile_training(graphdef, np.arange(size.rows) % seen, unseen, settings.images, settings)
  one = jax.sharding.Mesh(place.devices.devices[:1], place.devices.axis_names)
  inputs = placed((*state, array(size.rows, width), array(SOURCES, unseen * settings.images, width)),
                  mesh.replicated(one))
  return [Program("train", settings.images, lambda: train.lower(*inputs))]


PROGRAMS = {"tokens": tokens, "generate": generated, "features": features, "classifier": zero_shot}
