"""What the CPU's compiler says a device needs for Stable Diffusion 1.5 with its weights divided among so many devices.

`python -m tests.fsdp_memory 1 2 4`: a line for each step and number. Nothing is executed, and weights take no memory.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ("--xla_force_host_platform_device_count=4 "
                           # The other scheduler does not look at memory and gathers everything at once.
                           "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import dataclasses
import functools
import pathlib

import jax
import numpy as np
from flax import nnx

from digzsl_jax import diffusion, fsdp, logs, mesh
from digzsl_jax.bench import sizes, steps
from digzsl_jax.models import cdm, clip, hub, stable_diffusion, unet, vae
from digzsl_jax.runs import class_tokens, generate


def models(size: sizes.Size) -> class_tokens.Guide:
  """As those of the bench in float32, of zeros that no memory is behind until they are written."""
  make = lambda kind, config, **switches: hub.abstract(kind, config, **switches)
  sd = stable_diffusion.StableDiffusion(
      make(clip.CLIPTextModel, size.text), make(unet.UNet2DConditionModel, size.unet, remat=True),
      make(vae.AutoencoderKL, size.vae, remat=True))
  encoder = cdm.Encoder(make(clip.CLIPModel, size.clip), pathlib.Path("no folder"))
  head = nnx.eval_shape(lambda: cdm.Head(size.head[0], encoder.width, size.head[1], size.clip_config.projection_dim,
                                         rngs=nnx.Rngs(0)))
  return class_tokens.Guide(sd, cdm.CDM(encoder, head))


def abstract(tree, shardings):
  return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree,
                      jax.tree.broadcast(shardings, tree))


def divided(tree, devices):
  """Shapes of what `mesh.place_models` places."""
  tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
  if fsdp.AXIS in devices.axis_names:
    tree = fsdp.divide(tree, devices.shape[fsdp.AXIS])
  return abstract(tree, jax.tree.map(functools.partial(jax.sharding.NamedSharding, devices), fsdp.specs(tree)))


def lowered(parts: int):
  """`name, step` of one class with one picture on each device."""
  size, devices = sizes.SIZES["sd15"](), mesh.make(4, parts)
  rng, count, rows = np.random.default_rng(0), size.classes[0], mesh.by_class(devices)
  settings = dataclasses.replace(size.tokens, slots=devices.size, images=1)
  guide, schedule = models(size), diffusion.Schedule.from_config(size.schedule)
  graphdef, params = nnx.split(guide)
  ids_kl, null_l = steps.prompts(rng, size, count)
  classes = class_tokens.Classes(np.arange(count), np.ones(count, bool), ids_kl,
                                 np.zeros((count, size.clip_config.projection_dim), np.float32), null_l)
  frozen = divided(class_tokens.Frozen(params, classes), devices)
  width = guide.sd.text_width
  slots = class_tokens.fresh_slots(settings, np.arange(devices.size), np.zeros((count, 1, width), np.float32))
  path, slots = class_tokens.gradient_path(settings, schedule), abstract(slots, rows)
  prefix, learn = class_tokens.compile_steps(settings, 0, path, graphdef, devices)
  yield "prefix", prefix.lower(frozen, slots)
  yield "learn", learn.lower(frozen, slots, jax.eval_shape(prefix, frozen, slots))
  settings = dataclasses.replace(size.generate, batch=1)
  graphdef, params = nnx.split(guide.sd)
  sampler = diffusion.make_sampler(schedule, settings.steps, settings.sampler)
  sample = generate.compile_sampler(settings, 0, sampler, graphdef, devices)
  zeros = lambda *shape: np.zeros((devices.size, *shape), np.int32)
  made = generate.Rows(zeros(), zeros(), zeros(size.length), zeros(1, width).astype(np.float32))
  yield "generate", sample.lower(divided((params, null_l), devices), abstract(made, rows))


if __name__ == "__main__":
  for parts in map(int, sys.argv[1:]):
    for name, step in lowered(parts):
      print(f"fsdp {parts}, {name}: {logs.memory_and_flops(step.compile())}", flush=True)
