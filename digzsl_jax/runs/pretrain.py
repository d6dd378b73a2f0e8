"""Trains the small CLIP, Stable Diffusion and judge of a world, and writes them as checkpoints.

Parts, each a stage with checkpoints and exact resume: `tokenizer`, `vae`, `clip`, `judge`, `sd`,
`export`, which copies the finished folders (Hugging Face / diffusers layout, float16) to where they ship, and `lcm`,
which distils a denoiser for few steps from that of `sd` or of another Stable Diffusion.

Shapes: n picture of the corpus, b row of a batch, h w pixel or latent position, c colour, z latent
channel, l caption position, d embedding.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from digzsl_jax import checkpoint, consistency, diffusion, files, loop, losses, world_export
from digzsl_jax.base_workspace import check, locate, parse
from digzsl_jax.data import fashion_mnist, scenes, tokenizer
from digzsl_jax.logs import Log, memory_and_flops, parameter_table, write_provenance
from digzsl_jax.models import clip, clip_patches, download, hub, judge, stable_diffusion, unet, vae


class Corpus(NamedTuple):
  """Captioned pictures; `labels` are names of the class that a caption is of, the truth that it may miss."""

  images_nhwc: np.ndarray
  captions: list[str]
  labels: list[str]
  words: tuple[str, ...]


def load_corpus(settings: Mapping, seed: int) -> Corpus:
  """Pictures, captions and true names of a world, in an order that has no meaning.

  Raises:
    ValueError: pictures that are not there, or an impossible setting.
  """
  arguments = {field: value for field, value in settings.items() if field not in ("name", "images")}
  try:
    if settings["name"] == "scenes":
      images, captions, attributes_na = scenes.web_corpus(settings["images"], seed, **arguments)
      return Corpus(images, captions, [scenes.NAMES[k] for k in scenes.class_number(*attributes_na.T)], scenes.WORDS)
    images, captions, labels = fashion_mnist.web_corpus(n=settings["images"], seed=seed, **arguments)
    return Corpus(images, captions, [fashion_mnist.NAMES[k] for k in labels], fashion_mnist.WORDS)
  except ValueError as error:
    raise ValueError(f"config.corpus: {error}") from error


def to_images(images_bhwc: jax.Array) -> jax.Array:
  """uint8 pictures as float32 in [-1, 1]."""
  return images_bhwc.astype(jnp.float32) / 127.5 - 1


def vae_loss(kl_weight: float, model: vae.AutoencoderKL, frozen: None, images_bhwc: jax.Array, key: jax.Array):
  """L1 + MSE + weighted KL (arXiv 2112.10752 without its adversarial and perceptual terms)."""
  target = to_images(images_bhwc)
  mean, logvar = model.encode(target)
  latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  error = model.decode(latents) - target
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
  mse = jnp.mean(error**2)
  psnr = 10 * jnp.log10(4 / mse)  # images span [-1, 1]
  return jnp.abs(error).mean() + mse + kl_weight * kl, {"psnr": psnr, "kl": kl}


def clip_loss(patches: float, model: clip.CLIPModel, frozen: None, batch, key: jax.Array):
  """Symmetric cross-entropy over the batch (arXiv 2103.00020, figure 3); `patches` times that of patches besides."""
  images_bhwc, ids_bl = batch
  images_bp, out = model.encode_image(to_images(images_bhwc))
  texts_bp = model.encode_text(ids_bl)[0]
  scale = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(100.0)))
  loss, accuracy = losses.clip(images_bp, texts_bp, scale)
  found = {"accuracy": accuracy}
  if patches:
    patches_blp = clip_patches.patch_embeds(model, out["hidden"][-2], out["values"][-1])
    of_patches, found["patch_accuracy"] = losses.patch_clip(patches_blp, texts_bp, scale)
    loss += patches * of_patches
  return loss, {"loss": loss} | found


def judge_loss(model: judge.Judge, frozen: None, batch, key: jax.Array):
  """Cross-entropy of every head on pictures with random blur and noise, so that soft edges do not decide."""
  images_bhwc, labels = batch
  images, (blur_key, noise_key) = to_images(images_bhwc), jax.random.split(key)
  rows = (images.shape[0], 1, 1, 1)
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  blurred = sum(padded[:, i:i + images.shape[1], j:j + images.shape[2]] for i in range(3) for j in range(3)) / 9
  amount = jax.random.uniform(blur_key, rows)
  images = images + amount * (blurred - images) + 0.1 * jax.random.normal(noise_key, images.shape)
  logits = model(images)
  loss = sum(optax.softmax_cross_entropy_with_integer_labels(logits[head], labels[head]).mean() for head in logits)
  right = jnp.stack([logits[head].argmax(-1) == labels[head] for head in logits]).all(0)
  return loss, {"loss": loss, "accuracy": right.mean()}


def sd_loss(schedule: diffusion.Schedule, drop: float, text: nnx.GraphDef, model: unet.UNet2DConditionModel,
            frozen: tuple[nnx.State, jax.Array], batch, key: jax.Array):
  """Mean squared error of the predicted noise or velocity; captions dropped with probability `drop`.

  `frozen` holds the weights of the text tower `text`, and the ids of the empty caption.
  """
  (latents_bhwz, ids_bl), (text_params, null_l) = batch, frozen
  drop_key, time_key, noise_key = jax.random.split(key, 3)
  rows = latents_bhwz.shape[0]
  ids_bl = jnp.where(jax.random.uniform(drop_key, (rows, 1)) < drop, null_l, ids_bl)
  noise = jax.random.normal(noise_key, latents_bhwz.shape)
  times_b = diffusion.stratified(time_key, rows, len(schedule.alphas_cumprod))
  noisy = diffusion.add_noise(schedule, latents_bhwz, noise, times_b)
  target = diffusion.training_target(schedule, latents_bhwz, noise, times_b)
  output = model(noisy, times_b, nnx.merge(text, text_params)(ids_bl)[0])
  loss = jnp.mean((output - target) ** 2)
  return loss, {"loss": loss}


@dataclasses.dataclass
class World:
  """What the parts share while they run: corpus (made when first asked for), folders, log."""

  corpus_settings: Mapping
  workdir: pathlib.Path
  log: Log
  seed: int
  dry_run: bool = False

  @functools.cached_property
  def corpus(self) -> Corpus:
    self.log.say(f"corpus: {self.corpus_settings['images']} captioned pictures of {self.corpus_settings['name']}")
    return load_corpus(self.corpus_settings, self.seed)

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """What the part `tokenizer` wrote."""
    return tokenizer.Tokenizer.from_folder(self.workdir / "tokenizer")

  @functools.cached_property
  def ids_nl(self) -> jax.Array:
    """Token ids of the captions."""
    return jnp.asarray(self.tokenizer(self.corpus.captions))

  @functools.cached_property
  def images_nhwc(self) -> jax.Array:
    """The pictures of the corpus, uint8."""
    return jnp.asarray(self.corpus.images_nhwc)

  def fit(self, name: str, part: Mapping, model: nnx.Module, loss: Callable, data: Any, frozen: Any = None):
    """`(trained model, held-out metrics)`; a dry run prints what it would take and trains nothing."""
    training = loop.Loop(name, loop.Training(**part["training"]), model, loss, data, frozen, self.seed)
    if not self.dry_run:
      return training.run(self.workdir / name, self.log)
    print(parameter_table({name: model}))
    print(f"  update: {memory_and_flops(training.lower().compile())}\n")
    return model, {}


def train_tokenizer(world: World, part: Mapping) -> dict:
  """Writes a tokenizer in which every word of the corpus is one token."""
  tokenizer.train_bpe(world.corpus.words, world.workdir / "tokenizer", length=part["length"])
  return {"vocabulary": world.tokenizer.vocab_size}


def train_vae(world: World, part: Mapping) -> dict:
  """Trains the autoencoder and writes it as a diffusers folder, whose `scaling_factor` gives latents unit variance."""
  config = dict(part["model"], _class_name="AutoencoderKL", scaling_factor=1.0)
  model, held = world.fit("vae", part, loop.build(vae.AutoencoderKL, config, world.seed),
                          functools.partial(vae_loss, part["kl"]), world.images_nhwc)
  latents = encode(model, world.images_nhwc[:4096])
  config["scaling_factor"] = float(1 / latents.std())  # unit variance, as Stable Diffusion's 0.18215
  hub.save(model, world.workdir / "vae", config, file_name="diffusion_pytorch_model.safetensors")
  return held | {"scaling_factor": config["scaling_factor"]}


def encode(model: vae.AutoencoderKL, images_nhwc: jax.Array, batch: int = 512) -> jax.Array:
  """Latent means of all pictures, unscaled."""
  graphdef, params = nnx.split(model)
  mean = jax.jit(lambda params, images: nnx.merge(graphdef, params).encode(to_images(images))[0])
  return jnp.concatenate([mean(params, images_nhwc[i:i + batch]) for i in range(0, len(images_nhwc), batch)])


def train_clip(world: World, part: Mapping) -> dict:
  """Trains CLIP on pictures and captions; a transformers folder with its `preprocessor_config.json`."""
  words, shared = world.tokenizer, {"projection_dim": part["projection_dim"]}
  text = dict(part["text"], model_type="clip_text_model", vocab_size=words.vocab_size, bos_token_id=words.bos_id,
              eos_token_id=words.eos_id, pad_token_id=words.pad_id, max_position_embeddings=words.length)
  config = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text | shared,
            "vision_config": dict(part["vision"], model_type="clip_vision_model") | shared} | shared
  model, held = world.fit("clip", part, loop.build(clip.CLIPModel, config, world.seed),
                          functools.partial(clip_loss, part["patches"]), (world.images_nhwc, world.ids_nl))
  hub.save(model, world.workdir / "clip", config)
  files.write_json(world.workdir / "clip" / "preprocessor_config.json", preprocessor(part["vision"]["image_size"]))
  return held | {"logit_scale": float(jnp.exp(model.logit_scale[...]))}


def preprocessor(size: int) -> dict:
  """For transformers' CLIPImageProcessor: images of this size, [0, 1] to [-1, 1]."""
  return {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
          "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
          "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, "image_mean": [0.5] * 3,
          "image_std": [0.5] * 3}


def train_judge(world: World, part: Mapping) -> dict:
  """Trains the judge on the true names of the pictures, not on their captions.

  Raises:
    ValueError: a head has none or several labels for a name.
  """
  config = part["model"]
  rows = [judge.targets(config, name) for name in world.corpus.labels]
  labels = {head: jnp.array([row[head] for row in rows]) for head in config["heads"]}
  model, held = world.fit("judge", part, loop.build(judge.Judge, config, world.seed), judge_loss,
                          (world.images_nhwc, labels))
  hub.save(model, world.workdir / "judge", config)
  return held


def train_sd(world: World, part: Mapping) -> dict:
  """The denoiser on latents, with CLIP's frozen text tower as in Stable Diffusion 1.x; a whole diffusers folder."""
  folder, autoencoder = world.workdir / "sd", hub.load(vae.AutoencoderKL, world.workdir / "vae")
  latents = encode(autoencoder, world.images_nhwc) * autoencoder.scaling_factor
  encoder = hub.load(clip.CLIPModel, world.workdir / "clip").text_model
  text = hub.read_json(world.workdir / "clip" / "config.json")["text_config"] | {"architectures": ["CLIPTextModel"]}
  graphdef, text_params = nnx.split(encoder)
  denoiser = dict(part["unet"], _class_name="UNet2DConditionModel", cross_attention_dim=text["hidden_size"])
  scheduler = dict(part["scheduler"])
  model = loop.build(unet.UNet2DConditionModel, denoiser, world.seed)
  loss = functools.partial(sd_loss, diffusion.Schedule.from_config(scheduler), part["drop"], graphdef)
  null_l = jnp.asarray(world.tokenizer([""]))[0]
  model, held = world.fit("sd", part, model, loss, (latents, world.ids_nl), frozen=(text_params, null_l))
  hub.save(encoder, folder / "text_encoder", text)
  hub.save(model, folder / "unet", denoiser, file_name="diffusion_pytorch_model.safetensors")
  files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
  return held


def export(world: World, part: Mapping) -> dict:
  """Copies the checkpoints that this world has to `part["folder"]`, replacing what was there."""
  target = pathlib.Path(part["folder"]).expanduser() if part["folder"] else world.workdir / "export" / part["world"]
  made = [name for name in ("vae", "clip", "judge", "sd") if (world.workdir / name / "done.json").exists()]
  return world_export.export(world.workdir, target, part["world"], made, world.corpus_settings, world.seed,
                             sorted(set(world.corpus.labels)))


def teacher_path(name: str) -> pathlib.Path:
  """Where the teacher of `lcm` is.

  Raises:
    ValueError: there is none, or it is a single file.
  """
  path = locate(name, download.STABLE_DIFFUSION, "config.lcm.sd")
  if path.is_file():
    raise ValueError(f"config.lcm.sd is {name!r}, a single file; distil from a folder in the layout of diffusers")
  return path


def train_lcm(world: World, part: Mapping) -> dict:
  """A denoiser for the sampler `lcm`, distilled with what came with its teacher; `unet` and `scheduler` of diffusers.

  Raises:
    ValueError: there is no such teacher, or it paints pictures of another size than the corpus has.
  """
  folder, words, given = world.workdir / "sd", world.workdir / "tokenizer", {"vae": world.workdir / "vae"}
  if part["sd"]:
    folder, given = teacher_path(part["sd"]), {}
    words = stable_diffusion.tokenizer_folder(folder)
  teacher, words = stable_diffusion.load(folder, **given), tokenizer.Tokenizer.from_folder(words)
  if (size := world.images_nhwc.shape[1:]) != teacher.image_shape:
    raise ValueError(f"config.lcm.sd is {part['sd']!r}, which paints pictures of {teacher.image_shape}; those of the "
                     f"corpus are {size}")
  schedule = stable_diffusion.load_schedule(folder)
  latents = encode(teacher.vae, world.images_nhwc) * teacher.vae.scaling_factor
  (text, text_params), (graphdef, params) = nnx.split(teacher.text_encoder), nnx.split(teacher.unet)
  loss = functools.partial(consistency.loss, schedule, part["skip"], part["guidance"], text, graphdef)
  frozen = text_params, jax.tree.map(jnp.copy, params), jnp.asarray(words([""]))[0]  # updates overwrite the student's
  model, held = world.fit("lcm", part, teacher.unet, loss, (latents, jnp.asarray(words(world.corpus.captions))), frozen)
  hub.save(model, world.workdir / "lcm" / "unet", hub.read_json(folder / "unet" / "config.json"),
           file_name="diffusion_pytorch_model.safetensors")
  scheduler = dict(schedule.config, _class_name="LCMScheduler")
  files.write_json(world.workdir / "lcm" / "scheduler" / "scheduler_config.json", scheduler)
  return held


PARTS = {"tokenizer": train_tokenizer, "vae": train_vae, "clip": train_clip, "judge": train_judge, "sd": train_sd,
         "export": export, "lcm": train_lcm}
NEEDS = {"tokenizer": (), "vae": (), "clip": ("tokenizer",), "judge": (), "sd": ("tokenizer", "vae", "clip"),
         "export": (),  # and what there is of those above: a world may do without Stable Diffusion
         "lcm": ("tokenizer", "vae", "sd")}  # unless `lcm.sd` names another teacher


FIELDS = {"tokenizer": {"length"}, "vae": {"model", "kl", "training"}, "judge": {"model", "training"},
          "clip": {"projection_dim", "patches", "text", "vision", "training"},
          "sd": {"drop", "unet", "scheduler", "training"}, "export": {"world", "folder"},
          "lcm": {"sd", "skip", "guidance", "training"}}
CORPORA = {"scenes": {"name", "images", "mixup", "target_share", "objects"},
           "fashion_mnist": {"name", "images", "mixup", "folder", "source"}}


def check_fields(config: Mapping) -> None:
  """Raises ValueError for a section or field that nothing reads, and for one that is missing."""
  if wrong := set(config) ^ {"method", "seed", "stages", "corpus", *PARTS}:
    raise ValueError(f"config has unknown or lacks sections {sorted(wrong)}")
  if (name := config["corpus"].get("name")) not in CORPORA:
    raise ValueError(f"config.corpus.name is {name!r}; known: {sorted(CORPORA)}")
  for section, known in (("corpus", CORPORA[name]), *FIELDS.items()):
    if wrong := set(config[section]) ^ known:
      raise ValueError(f"config.{section} has unknown or lacks fields {sorted(wrong)}")
    if "skip" in known:
      check(config[section]["skip"] >= 1, f"config.{section}.skip", config[section]["skip"], "at least 1")
    if "training" in known:
      parse(loop.Training, config[section]["training"], f"{section}.training")


def run(config: Mapping, workdir: pathlib.Path, log: Log, dry_run: bool) -> None:
  """Runs the parts named in `config["stages"]`, each skipped when its result is there.

  A dry run goes through all of them with a handful of pictures and no training, in a temporary folder.
  """
  check_fields(config)
  asked = checkpoint.choose(config["stages"], PARTS)
  if dry_run:
    print("stages:", ", ".join(asked))
    with tempfile.TemporaryDirectory() as folder:
      few = dict(config["corpus"], images=2 * loop.HELD_OUT)
      world = World(few, pathlib.Path(folder), log, config["seed"], dry_run=True)
      for name in ("tokenizer", "vae", "clip", "judge", "sd", "lcm"):
        PARTS[name](world, config[name])
    return
  world, stages, needs = World(config["corpus"], workdir, log, config["seed"]), {}, dict(NEEDS)
  for name in PARTS:
    inputs = {"seed": config["seed"], "corpus": config["corpus"], name: config[name]}
    if name == "export":
      needs[name] = tuple(part for part in stages if part in asked or stages[part].done)
    elif name == "lcm" and name in asked and config[name]["sd"]:
      needs[name], folder = (), teacher_path(config[name]["sd"])
      inputs["teacher"] = checkpoint.fingerprint_files(folder, download.files(folder, download.STABLE_DIFFUSION))
    inputs |= {need: stages[need].fingerprint for need in needs[name]}
    stages[name] = checkpoint.Stage(workdir / name, inputs)
  checkpoint.claim(stages, needs, asked)
  write_provenance(workdir, config)
  for name in asked:
    if not stages[name].done:
      stages[name].make(functools.partial(PARTS[name], world, config[name]))
    log.say(f"{name}: {stages[name].results()}")
