"""The benches: production's compiled steps on random inputs and weights.

Shapes: b row, k class, l prompt position, d text width, p width of the shared space, n image or feature row,
i j height and width in pixels, h w latent position, z latent channel, c colour, f feature, r made row, s source.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import diffusion, flops, mesh, quality, tagger
from digzsl_jax.bench.sizes import Place, Size
from digzsl_jax.data import native
from digzsl_jax.models import cdm, clip, vae
from digzsl_jax.models.classifier import Classifier
from digzsl_jax.runs import cdm as cdm_run
from digzsl_jax.runs import class_tokens, classifier, generate

SEED = 0
TIMESTEP = 601.0
STREAMED = 3  # batches of images that one call of `features` takes


@dataclasses.dataclass(frozen=True)
class Bench:
  """Something to be timed.

  Attributes:
    start: makes the compiled steps and returns a call of them; what it returns is waited for.
    images: that a call makes or works on, on all devices.
    batch: of a device.
    steps: denoiser calls of a picture or updates of a training; 1 where there are none.
    flop: of a call, from its result; None where arithmetic does not tell.
    lower: the compiled steps, for their memory.
    answer: what a peer must agree with, from the first result.
    parts: models that the peer needs, of `Models.write`.
    inputs: what the peer computes from.
    facts: the same of numbers and names, JSON-like.
  """

  start: Callable[[], Callable[[], Any]]
  images: int
  batch: int
  steps: int
  flop: Callable[[Any], int | None]
  lower: Callable[[], list[jax.stages.Lowered]] = list
  answer: Callable[[Any], dict[str, np.ndarray]] = lambda result: {}
  parts: tuple[str, ...] = ()
  inputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
  vectors = rng.normal(size=(rows, width)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def text_config(size: Size) -> clip.TextConfig:
  return clip.TextConfig.from_json(size.text)


def prompts(rng: np.random.Generator, size: Size, rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Random prompts with a learnt token at position 4, `[b, l]`, and an empty one, `[l]`."""
  known = text_config(size).vocab_size
  ids_bl = rng.integers(0, known - 2, (rows, size.length)).astype(np.int32)
  ids_bl[:, 4] = known
  return ids_bl, np.full(size.length, known - 1, np.int32)


def denoiser_flop(size: Size) -> int:
  side = size.unet_config.sample_size
  return flops.unet(size.unet_config, side, side, size.length).forward


def decoder_work(size: Size) -> flops.Work:
  side = size.unet_config.sample_size
  return flops.vae_decoder(vae.VAEConfig.from_json(size.vae), side, side)


def vision_work(size: Size) -> flops.Work:
  config = size.clip_config
  return flops.vision(config.vision_config, config.vision_config.image_size, config.projection_dim)


def sampler_facts(size: Size, steps: int, kind: str, guidance: float) -> dict[str, Any]:
  return {"schedule": dict(size.schedule), "steps": steps, "sampler": kind, "guidance": guidance}


def tokens(place: Place) -> Bench:
  """One update of one token for each of `batch` classes on every device: `prefix` and `learn`."""
  size, devices, rng = place.size, place.devices, np.random.default_rng(SEED)
  settings, sd, count = place.tokens(), place.models.sd, size.classes[0]
  graphdef, params = nnx.split(class_tokens.Guide(sd, cdm.CDM(place.models.encoder, place.models.head())))
  path = class_tokens.gradient_path(settings, place.models.schedule())
  ids_kl, null_l = prompts(rng, size, count)
  classes = class_tokens.Classes(*map(jnp.asarray, (
      np.arange(count), np.ones(count, bool), ids_kl, unit(rng, count, size.clip_config.projection_dim), null_l)))
  start_knd = (0.05 * rng.normal(size=(count, 1, sd.text_width))).astype(np.float32)
  fresh = lambda: class_tokens.fresh_slots(settings, np.arange(settings.slots) % count, start_knd)
  put = lambda: jax.device_put(fresh(), mesh.by_class(devices))
  frozen = jax.device_put(class_tokens.Frozen(params, classes), mesh.replicated(devices))
  compiled = functools.partial(class_tokens.compile_steps, settings, SEED, path, graphdef, devices)

  def start():
    (prefix, learn), kept = compiled(place.programs), {"slots": put()}

    def call():
      slots = kept["slots"]
      kept["slots"], made = learn(frozen, slots, prefix(frozen, slots))
      return kept["slots"], made
    return call

  def lower():
    (prefix, learn), slots = compiled(), put()
    first = prefix.lower(frozen, slots)
    return [first, learn.lower(frozen, slots, first.out_info)]

  def answer(result):
    slots, made = result
    # Of AdamW's first step the mean gradient alone: the step itself is a sign.
    [gradient_cnd] = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(slots.optimiser)
                      if ".mu" in jax.tree_util.keystr(path)]
    return {"loss": np.asarray(made.loss_c), "gradient": np.asarray(gradient_cnd) / (1 - 0.9)}

  slots = fresh()
  noise_bhwz = class_tokens.noise(settings, SEED, classes, slots, sd.latent_shape)
  facts = sampler_facts(size, settings.steps, settings.sampler, settings.guidance) | {
      name: getattr(settings, name) for name in ("gradient", "images", "temperature", "learning_rate", "clip_norm",
                                                 "remat")}
  return Bench(
      start, settings.slots * settings.images, settings.slots_per_body, path.sampler.calls,
      lambda _: tokens_flop(size, settings, path) * settings.slots, lower, answer, ("sd", "clip"),
      dict(ids=ids_kl, null=null_l, prototypes=np.asarray(classes.prototypes_kd), noise=np.asarray(noise_bhwz),
           tokens=start_knd, classes=np.asarray(slots.class_c), **head_arrays(place.models.head())),
      facts | {"timesteps": path.sampler.timesteps.tolist(), "cut": path.cut, "head": size.head[0]})


def tokens_flop(size: Size, settings: class_tokens.Settings, path: class_tokens.Path) -> int:
  """Of one class; what remat computes again does not count, nor does the empty prompt, which all share."""
  side, backward = size.unet_config.sample_size, functools.partial(flops.unet_backward, size.unet_config)
  halves, ways = (2, 1 if settings.stop_unconditional else 2) if settings.guidance != 1 else (1, 1)
  calls, differentiated = path.sampler.calls, path.sampler.calls - path.cut
  back = sum(backward(side, side, size.length, latents=bool(n)) * (ways if n else 1) for n in range(differentiated))
  judged = decoder_work(size) + vision_work(size)
  image = calls * halves * denoiser_flop(size) + back + judged.forward + judged.backward
  text = flops.text(text_config(size), size.length)
  return settings.images * image + text.forward + text.backward


def head_arrays(head: cdm.Head) -> dict[str, np.ndarray]:
  """As `torch.nn.Linear` has them."""
  return {f"{name}.{kind}": np.asarray(value).T.copy() for name in ("fc1", "fc2")
          for kind, value in (("weight", getattr(head, name).kernel[...]), ("bias", getattr(head, name).bias[...]))}


def generated(place: Place) -> Bench:
  """One batch of pictures on every device, from prompt to pixels."""
  size, devices, rng = place.size, place.devices, np.random.default_rng(SEED)
  settings, sd = place.generate(), place.models.sd
  count = settings.batch * devices.size
  sampler = diffusion.make_sampler(place.models.schedule(), settings.steps, settings.sampler)
  graphdef, params = nnx.split(sd)
  ids_bl, null_l = prompts(rng, size, count)
  rows = generate.Rows(np.arange(count), np.zeros(count, np.int32), ids_bl,
                       (0.05 * rng.normal(size=(count, 1, sd.text_width))).astype(np.float32))
  placed = jax.device_put(rows, mesh.by_class(devices))
  frozen = jax.device_put((params, jnp.asarray(null_l)), mesh.replicated(devices))
  compiled = functools.partial(generate.compile_sampler, settings, SEED, sampler, graphdef, devices)

  def start():
    paint = compiled(place.programs)
    return lambda: paint(frozen, placed)

  root = jax.random.fold_in(jax.random.key(SEED), generate.NOISE_STREAM)
  address = lambda label: jax.random.fold_in(jax.random.fold_in(root, label), 0)
  noise_bhwz = jnp.stack([jax.random.normal(address(label), sd.latent_shape) for label in range(count)])
  halves = 1 if settings.guidance == 1 else 2
  image = (sampler.calls * halves * denoiser_flop(size) + decoder_work(size).forward
           + flops.text(text_config(size), size.length).forward)
  return Bench(start, count, settings.batch, sampler.calls, lambda _: count * image,
               lambda: [compiled().lower(frozen, placed)],
               lambda images: {"pixels": np.asarray(images).astype(np.float32)}, ("sd",),
               dict(ids=ids_bl, null=null_l, noise=np.asarray(noise_bhwz), tokens=rows.token_bnd),
               sampler_facts(size, settings.steps, settings.sampler, settings.guidance) | {"batch": count})


def features(place: Place) -> Bench:
  """Feature rows of pictures in memory, uint8 of the encoder's size, to the host."""
  batch, side = place.batch_of("features"), place.size.clip_config.vision_config.image_size
  count = STREAMED * batch * jax.local_device_count()
  images_nijc = np.random.default_rng(SEED).integers(0, 256, (count, side, side, 3), np.uint8)

  def start():
    stream = cdm.streamed(place.models.encoder, batch)
    return lambda: np.concatenate(list(stream(images_nijc)))

  return Bench(start, count, batch, 1, lambda _: count * vision_work(place.size).forward,
               answer=lambda rows_nf: {"features": rows_nf}, parts=("clip",), inputs={"images": images_nijc},
               facts={"batch": batch})


def head(place: Place) -> Bench:
  """The whole training of a CDM's head on cached features, one compiled call."""
  size, rng = place.size, np.random.default_rng(SEED)
  settings = dataclasses.replace(size.cdm, batch=place.batch_of("head"), steps=place.steps or size.cdm.steps)
  config, seen = size.clip_config, size.classes[1]
  width, outputs = config.vision_config.hidden_size, config.projection_dim
  model = place.models.head()
  graphdef, params = nnx.split(model)
  labels_n = (np.arange(size.rows) % seen).astype(np.int32)
  features_nf = np.concatenate([rng.normal(size=(size.rows, width)), unit(rng, size.rows, outputs)], 1)
  arrays = (features_nf.astype(np.float32), labels_n, unit(rng, seen, outputs))
  placed, key = jax.device_put(arrays), jax.random.key(SEED)

  def start():
    train = cdm_run.compile_training(graphdef, settings)
    return lambda: train(params, *placed, key)

  draw = lambda step: jax.random.randint(jax.random.fold_in(key, step), (settings.batch,), 0, size.rows)
  first = flops.linear(1, outputs if size.head[0] == "residual" else width, settings.hidden)
  image = 2 * first.forward + 3 * flops.linear(1, settings.hidden, outputs).forward
  image += 2 * flops.linear(1, outputs, seen).forward
  return Bench(start, settings.steps * settings.batch, settings.batch, settings.steps,
               lambda _: settings.steps * settings.batch * image,
               lambda: [cdm_run.compile_training(graphdef, settings).lower(params, *placed, key)],
               lambda result: {"losses": np.asarray(result[1])}, (),
               dict(features=arrays[0], labels=labels_n, prototypes=arrays[2],
                    rows=np.asarray(jax.vmap(draw)(jnp.arange(settings.steps))), **head_arrays(model)),
               dict(steps=settings.steps, temperature=settings.temperature, learning_rate=settings.learning_rate,
                    weight_decay=settings.weight_decay, head=size.head[0]))


SOURCES = 4  # of unseen images, as where a data set has real ones too


def zero_shot(place: Place) -> Bench:
  """The whole training of the zero-shot classifiers, of all sources at once; a device's batch is a class's images."""
  size, rng = place.size, np.random.default_rng(SEED)
  unseen, seen = size.classes
  images = place.batch_of("classifier")
  settings = dataclasses.replace(size.classifier, images=images, steps=place.steps or size.classifier.steps)
  config = size.clip_config
  pooled = config.vision_config.hidden_size
  columns = classifier.columns(settings.features, pooled, pooled + config.projection_dim)
  width = columns[1] - columns[0]
  model = Classifier(columns, settings.hidden, seen + unseen, rngs=nnx.Rngs(SEED))
  labels_n = (np.arange(size.rows) % seen).astype(np.int32)
  centres_kf = rng.normal(size=(seen + unseen, pooled + config.projection_dim))
  noisy = lambda rows: (centres_kf[rows] + rng.normal(size=(*rows.shape, centres_kf.shape[1]))).astype(np.float32)
  seen_nf = noisy(labels_n)
  model.standardise_by(seen_nf)
  unseen_srf = noisy(np.tile(np.repeat(seen + np.arange(unseen), images), (SOURCES, 1)))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  placed = jax.device_put((seen_nf, unseen_srf))
  compiled = lambda: classifier.compile_training(graphdef, labels_n, unseen, images, settings)

  def start():
    train = compiled()
    return lambda: train(params, rest, *placed)

  rows = settings.steps * SOURCES * (size.rows + unseen * images)
  return Bench(start, rows, images, settings.steps,
               lambda _: 2 * rows * flops.classifier(width, settings.hidden, seen + unseen).forward,
               lambda: [compiled().lower(params, rest, *placed)],
               lambda result: {"loss": np.asarray(result[1])}, (),
               {"seen": seen_nf[:, slice(*columns)], "labels": labels_n, "unseen": unseen_srf[..., slice(*columns)],
                "weight": np.asarray(model.fc2.kernel[...]).T.copy()},
               dict(steps=settings.steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
                    images=images, classes=unseen))


def tagclip(place: Place) -> Bench:
  """One padded batch of pictures through the engine, with the second looks that it asks for."""
  size, rng, batch = place.size, np.random.default_rng(SEED), place.batch_of("tagclip")
  config = size.clip_config
  patch, (labels, words), count = config.vision_config.patch_size, size.labels, batch * place.devices.size
  spots = rng.integers(0, 256, (count, *(side // 8 for side in size.picture), 3), np.uint8)
  pictures = native.ArrayPictures(spots.repeat(8, axis=1).repeat(8, axis=2), patch)
  [bucket] = native.plan(pictures.grids_n2, 1)
  text_kp = unit(rng, labels + words, config.projection_dim)
  rules = tagger.Rules(*size.rules)

  def start():
    engine = tagger.Tagger(place.models.clip, cdm.Preprocess(config.vision_config.image_size), text_kp, labels, rules,
                           pictures=batch, crops=4 * batch, devices=list(place.devices.devices.flat))
    return lambda: list(engine.stream(pictures, [bucket]))

  first = flops.tagclip_first(config.vision_config, *(side // patch for side in size.picture), config.projection_dim,
                              labels + words)
  second = flops.tagclip_second(config.vision_config, config.projection_dim, labels + words)
  return Bench(start, count, batch, 1, lambda batches: count * first.forward
               + sum(scored.looks for scored in batches) * second.forward)


def fid(place: Place) -> Bench:
  """The Frechet distance of two sides' feature rows, on the host."""
  count, width = place.batch_of("fid"), place.size.width
  rng = np.random.default_rng(SEED)
  mix = rng.normal(size=(width, width)) / np.sqrt(width)
  sides = [(rng.normal(size=(count, width)) @ mix + shift).astype(np.float32) for shift in (0, 0.1)]
  moments = lambda rows_nf: quality.Moments(width).update(rows_nf)

  def start():
    return lambda: np.array([quality.frechet_distance(*map(moments, sides))])

  return Bench(start, 2 * count, count, 1, lambda _: None, answer=lambda distance: {"distance": distance},
               inputs=dict(zip(("real", "made"), sides)))


def denoiser(place: Place) -> Bench:
  """One call of the denoiser on `batch` rows of every device."""
  size, devices, rng = place.size, place.devices, np.random.default_rng(SEED)
  batch, config = place.batch_of("unet"), size.unet_config
  count = batch * devices.size
  graphdef, params = nnx.split(place.models.sd.unet)
  arrays = [rng.normal(size=(count, config.sample_size, config.sample_size, config.in_channels)),
            np.full(count, TIMESTEP), rng.normal(size=(count, size.length, config.cross_attention_dim))]
  arrays = [array.astype(np.float32) for array in arrays]
  placed = jax.device_put(arrays, mesh.by_class(devices))
  params = jax.device_put(params, mesh.replicated(devices))
  compiled = lambda: jax.jit(lambda params, *arrays: nnx.merge(graphdef, params)(*arrays))

  def start():
    run = compiled()
    return lambda: run(params, *placed)

  return Bench(start, count, batch, 1, lambda _: count * denoiser_flop(size),
               lambda: [compiled().lower(params, *placed)],
               lambda output: {"output": np.asarray(output.astype(jnp.float32))}, ("sd",),
               dict(latents=arrays[0], text=arrays[2]), {"timestep": TIMESTEP})


BENCHES = {"tokens": tokens, "generate": generated, "features": features, "head": head, "classifier": zero_shot,
           "tagclip": tagclip, "fid": fid, "unet": denoiser}
