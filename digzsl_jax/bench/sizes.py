"""What is timed: architectures, random weights and settings of every size.

"tiny" has the models of the scenes that ship with the package and the settings of `configs/quickstart.py`; "sd15" and
"sd21" have those of the hub and of the papers' benchmarks (`configs/base.py`), with CLIP ViT-B/16.
"""

import dataclasses
import functools
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from digzsl_jax import base_workspace, checkpoint, diffusion
from digzsl_jax.models import cdm, clip, hub, stable_diffusion, unet, vae
from digzsl_jax.models.variants import VARIANTS
from digzsl_jax.runs import cdm as cdm_run
from digzsl_jax.runs import class_tokens, classifier, generate

SD_ALONE = ("tokens", "generate", "unet")  # what "sd21" has beside "sd15"
LOGIT_SCALE = math.log(100)  # of a trained CLIP


class Size(NamedTuple):
  """One size.

  Attributes:
    text, unet, vae, schedule: configs of a diffusers folder.
    clip: config of CLIP.
    batch: by bench, what a device does at a time unless the command says otherwise; of `fid` all features of a side.
    classes: unseen and seen.
    head: kind and hidden width of the CDM's head.
    rows: feature rows of seen classes.
    picture: height and width for TagCLIP.
    labels: for TagCLIP, and words of background.
    width: of FID's features.
    rules: first layer and votes of TagCLIP.
  """

  text: Mapping[str, Any]
  unet: Mapping[str, Any]
  vae: Mapping[str, Any]
  schedule: Mapping[str, Any]
  clip: Mapping[str, Any]
  tokens: class_tokens.Settings
  generate: generate.Settings
  cdm: cdm_run.Settings
  classifier: classifier.Settings
  batch: Mapping[str, int]
  classes: tuple[int, int]
  head: tuple[str, int]
  rows: int
  picture: tuple[int, int]
  labels: tuple[int, int]
  width: int
  rules: tuple[int, int]

  @property
  def clip_config(self) -> clip.CLIPConfig:
    return clip.CLIPConfig.from_json(self.clip)

  @property
  def unet_config(self) -> unet.UNetConfig:
    return unet.UNetConfig.from_json(self.unet)

  @property
  def length(self) -> int:
    """Tokens of a prompt."""
    return clip.TextConfig.from_json(self.text).max_position_embeddings


TOKENS = dict(template="a photo of {token} {name}", initial="a", initial_file="", vectors=1, guide="cdm", grad_calls=0,
              stop_unconditional=True, weight_decay=0.0, clip_norm=1.0, stop_accuracy=1.0,
              # A benchmark never stops by itself.
              patience=2**30, max_updates=2**30, check_every=1)
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
                clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")


def _tiny() -> Size:
  world = base_workspace.WORLDS / "scenes"
  read = lambda *parts: hub.read_json(world.joinpath(*parts))
  return Size(
      *(read("sd", name, "config.json") for name in ("text_encoder", "unet", "vae")),
      schedule=read("sd", "scheduler", "scheduler_config.json"), clip=read("clip", "config.json"),
      tokens=class_tokens.Settings(**TOKENS, gradient="x0", sampler="ddim", steps=3, x0_timestep=600, guidance=4.0,
                                   images=3, learning_rate=0.015, temperature=0.05, noise_period=1, slots=12,
                                   slots_per_body=6, grad_images=0, remat=False),
      generate=generate.Settings(images=24, sampler="dpm++", steps=10, guidance=4.0, batch=32),
      cdm=cdm_run.Settings(encoder="clip", kind="residual", hidden=256, temperature=0.05, steps=600, batch=256,
                           learning_rate=1e-3, weight_decay=0.0, cache=""),
      classifier=classifier.Settings(features="all", hidden=0, images=24, steps=300, learning_rate=0.01,
                                     weight_decay=1e-4),
      batch=dict(tokens=6, generate=32, features=256, head=256, classifier=24, tagclip=32, fid=2000, unet=64),
      classes=(12, 36), head=("residual", 256), rows=2160, picture=(32, 32), labels=(48, 12), width=64, rules=(2, 1))


def _full(text: str, denoiser: str, prediction: str) -> Size:
  return Size(
      dict(VARIANTS[text].config), dict(VARIANTS[denoiser].config, _class_name="UNet2DConditionModel"),
      dict(VARIANTS["sd.vae"].config, _class_name="AutoencoderKL"),
      schedule=dict(SCHEDULE, _class_name="DDIMScheduler", prediction_type=prediction),
      clip=dict(VARIANTS["clip-vit-b16"].config),
      tokens=class_tokens.Settings(**TOKENS, gradient="last", sampler="ddim", steps=30, x0_timestep=600, guidance=7.0,
                                   images=5, learning_rate=1.25e-3, temperature=1.0, noise_period=0, slots=4,
                                   slots_per_body=1, grad_images=0, remat=True),
      generate=generate.Settings(images=100, sampler="ddim", steps=50, guidance=7.5, batch=4),
      cdm=cdm_run.Settings(encoder="clip", kind="mlp", hidden=2048, temperature=0.07, steps=3000, batch=64,
                           learning_rate=1e-3, weight_decay=0.0, cache=""),
      classifier=classifier.Settings(features="pooled", hidden=0, images=100, steps=1000, learning_rate=1e-3,
                                     weight_decay=1e-4),
      batch=dict(tokens=1, generate=4, features=32, head=64, classifier=100, tagclip=4, fid=10_000, unet=2),
      classes=(50, 150), head=("mlp", 2048), rows=7000, picture=(480, 640), labels=(80, 23), width=2048, rules=(8, 4))


SIZES = {"tiny": _tiny, "sd15": functools.partial(_full, "sd15.text_encoder", "sd15.unet", "epsilon"),
         "sd21": functools.partial(_full, "sd21.text_encoder", "sd21.unet", "epsilon")}
FULL = ("sd15", "sd21")  # what "full" means


def filled(model: nnx.Module) -> nnx.Module:
  """An `hub.abstract` model with random weights, the same in every process; activations stay of order one.

  Zeros would be quicker than weights of a trained model on some devices.
  """
  graphdef, state = nnx.split(model)

  def draw(path, leaf):
    name, shape = jax.tree_util.keystr(path), leaf.shape
    spread = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) * 2 - 1
    if "logit_scale" in name:
      values = np.float32(LOGIT_SCALE)
    elif "kernel" in name:
      spread *= np.float32(math.sqrt(3 / math.prod(shape[:-1])))
      values = spread
    elif "scale" in name:
      values = 1 + 0.1 * spread
    else:
      values = 0.05 * spread
    return jax.numpy.asarray(values, leaf.dtype)

  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


class Models:
  """The models of a size, made when they are first asked for; `fill` gives `hub.abstract` models their weights."""

  def __init__(self, size: Size, dtype: str, fill: Callable[[nnx.Module], nnx.Module] = filled):
    self.size, self.dtype, self.fill = size, dtype, fill

  @functools.cached_property
  def sd(self) -> stable_diffusion.StableDiffusion:
    size, remat = self.size, self.size.tokens.remat
    make = lambda kind, config, **switches: self.fill(hub.abstract(kind, config, dtype=self.dtype, **switches))
    return stable_diffusion.StableDiffusion(
        make(clip.CLIPTextModel, size.text), make(unet.UNet2DConditionModel, size.unet, remat=remat),
        make(vae.AutoencoderKL, size.vae, remat=remat))

  @functools.cached_property
  def clip(self) -> clip.CLIPModel:
    return self.fill(hub.abstract(clip.CLIPModel, self.size.clip, dtype=self.dtype))

  @functools.cached_property
  def encoder(self) -> cdm.Encoder:
    """Takes pixels as they are, for want of a `preprocessor_config.json`."""
    return cdm.Encoder(self.clip, pathlib.Path("no folder"))

  def head(self) -> cdm.Head:
    """Never that of a residual head as it begins, which would be nothing."""
    kind, hidden = self.size.head
    head = nnx.eval_shape(lambda: cdm.Head(kind, self.encoder.width, hidden, self.size.clip_config.projection_dim,
                                           rngs=nnx.Rngs(0)))
    return self.fill(head)

  def schedule(self) -> diffusion.Schedule:
    return diffusion.Schedule.from_config(self.size.schedule)

  def write(self, folder: pathlib.Path, parts: tuple[str, ...]) -> None:
    """The `parts` out of "sd" and "clip" as folders that diffusers and transformers open."""
    if "sd" in parts:
      for name, part, config in (("text_encoder", self.sd.text_encoder, self.size.text),
                                 ("unet", self.sd.unet, self.size.unet), ("vae", self.sd.vae, self.size.vae)):
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        hub.save(part, folder / name, dict(config), dtype=np.float32, file_name=file)
    if "clip" in parts:
      hub.save(self.clip, folder / "clip", dict(self.size.clip), dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Place:
  """What a step is built for.

  Attributes:
    batch: of a device, classes for tokens and images elsewhere; 0 for the size's own.
    steps: denoiser calls of a picture or updates of a training; 0 for the size's own.
  """

  size: Size
  models: Models
  devices: jax.sharding.Mesh
  batch: int = 0
  steps: int = 0

  @property
  def programs(self) -> pathlib.Path | None:
    """Where traced steps of these settings lie: beside compiled code, as there is no run; None without that."""
    cache = jax.config.jax_compilation_cache_dir
    return cache and pathlib.Path(cache, "programs", checkpoint.fingerprint([self.size, self.batch, self.steps]))

  def batch_of(self, name: str) -> int:
    return self.batch or self.size.batch[name]

  def tokens(self) -> class_tokens.Settings:
    """Slots for a device's classes, all in one compiled body; large pictures are differentiated one by one on a CPU."""
    settings, batch = self.size.tokens, self.batch_of("tokens")
    one_by_one = settings.remat and self.devices.devices.flat[0].platform == "cpu"
    return dataclasses.replace(settings, slots=batch * self.devices.size, slots_per_body=batch,
                               grad_images=int(one_by_one), steps=self.steps or settings.steps)

  def generate(self) -> generate.Settings:
    settings = self.size.generate
    return dataclasses.replace(settings, batch=self.batch_of("generate"), steps=self.steps or settings.steps)
