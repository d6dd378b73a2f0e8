"""Command line of plain text-to-image: `python -m digzsl_jax.generate --checkpoint=X --prompt="..." --out=DIR`.

An image is addressed by its prompt and seed, `DIR/<prompt>/<seed>.png`, and carries both and all settings as PNG
text. Work goes in batches of a fixed composition; one whose files are all there is skipped, so a killed run goes on
and ends with the same bytes.

Shapes: b image, l prompt position, n learnt vector, d text width, h w latent or pixel position, z latent channel.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import batches as in_turn
from digzsl_jax import cli, diffusion, logs, mesh, shortcuts
from digzsl_jax.data import images, prompts, textual_inversion, tokenizer
from digzsl_jax.models import download, layers, stable_diffusion

Image = tuple[str, int]  # prompt and seed


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an image depends on besides prompt and seed; it is written into the file."""

  checkpoint: str
  unet: str | None
  vae: str | None
  tokens: Sequence[str]
  negative: str
  steps: int
  sampler: str
  guidance: float
  guidance_rescale: float
  guidance_until: float
  cache_interval: int
  cache_branch: int
  height: int
  width: int
  dtype: str


class Rows(NamedTuple):
  """What one image is made from."""

  seed_b: np.ndarray
  ids_bl: np.ndarray
  null_bl: np.ndarray


def noise(seed_b: jax.Array, number: int | jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Standard normal noise, `[b, h, w, z]`: number 0 is what an image begins with, the next are those of the calls."""
  one = lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)
  return jax.vmap(one)(seed_b)


def compile_images(settings: Settings, sampler: diffusion.Sampler, graphdef: nnx.GraphDef,
                   latent_shape: tuple[int, int, int], devices: jax.sharding.Mesh, batch: int):
  """The compiled `((params, vectors_nd), rows) -> images`, uint8; `batch` rows a body."""
  def paint(frozen, rows):
    params, vectors_nd = frozen
    sd = nnx.merge(graphdef, params)
    text_bld, null_bld = (sd.text(ids_bl, vectors_nd) for ids_bl in (rows.ids_bl, rows.null_bl))
    fresh = functools.partial(noise, rows.seed_b, shape=latent_shape)
    left_out = shortcuts.Shortcuts(settings.guidance_until, settings.cache_interval, settings.cache_branch)
    latents_bhwz = shortcuts.sample(sd.unet, text_bld, null_bld, settings.guidance, fresh(0), sampler,
                                    lambda call: fresh(call + 1), settings.guidance_rescale, left_out)
    return sd.pixels(latents_bhwz)

  def blank(frozen, rows):
    return jnp.zeros((batch, settings.height, settings.width, 3), jnp.uint8)

  return mesh.compile_chunked(paint, blank, devices, batch)


def read_prompts(given: list[str], file: str | None) -> list[str]:
  """Prompts of the command line and of a file, each once, in their order."""
  lines = []
  if file is not None:
    try:
      lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"--prompts: {file} cannot be read ({error}); give a text file with a prompt in every "
                       "line") from error
  found = list(dict.fromkeys([*given, *filter(str.strip, lines)]))
  if not found:
    raise ValueError("there is no prompt: give --prompt or --prompts")
  return found


def read_tokens(paths: list[str], words: tokenizer.Tokenizer,
                sd: stable_diffusion.StableDiffusion) -> tuple[tokenizer.Tokenizer, np.ndarray | None]:
  """`(words, vectors_nd)` of all files together; no vectors where there is no file.

  Raises:
    ValueError: a file is none of learnt tokens, two hold the same one, or tokenizer and text encoder differ.
  """
  found = {}
  for path in paths:
    tokens = textual_inversion.read(path, sd.text_width)
    if twice := sorted(found.keys() & tokens.keys()):
      raise ValueError(f"--tokens: {path} repeats {twice} of another file; rename them in one")
    found |= tokens
  if not found:
    return words, None
  rows = sd.text_encoder.embeddings.token_embedding.num_embeddings
  if rows != words.vocab_size:  # ids beyond both stand for learnt vectors
    raise ValueError(f"the checkpoint's tokenizer has {words.vocab_size} tokens, its text encoder {rows}; take both "
                     "from the same place")
  return textual_inversion.extend(words, found)


def file_of(out: pathlib.Path, image: Image) -> pathlib.Path:
  """Where an image goes."""
  prompt, seed = image
  return out / prompts.slug(prompt) / f"{seed:05d}.png"


def written(image: Image, settings: Settings) -> dict[str, str]:
  """What an image's file says of it."""
  named = {"prompt": image[0], "seed": image[1], **dataclasses.asdict(settings)}
  return {name: str(value) for name, value in named.items()}


def is_there(out: pathlib.Path, image: Image, settings: Settings) -> bool:
  """Whether an image is made already.

  Raises:
    ValueError: it is, but with other settings.
  """
  path, wanted = file_of(out, image), written(image, settings)
  if not path.exists():
    return False
  found = images.read_text(path)
  for field, value in wanted.items():
    if found.get(field) != value:
      raise ValueError(f"{path} was made with {field}={found.get(field)!r}, now it is {value!r}: choose another --out "
                       "or delete the file")
  return True


def rows_of(batch: Sequence[Image], words: tokenizer.Tokenizer, negative: str, size: int) -> Rows:
  """Rows of a batch; the last one is filled up with copies of its last image, which are thrown away."""
  filled = [*batch, *batch[-1:] * (size - len(batch))]
  return Rows(np.array([seed for _, seed in filled], np.uint32), words([prompt for prompt, _ in filled]),
              words([negative] * size))


def paint_missing(wanted: Sequence[Image], settings: Settings, sd: stable_diffusion.StableDiffusion,
                  sampler: diffusion.Sampler, words: tokenizer.Tokenizer, vectors_nd: np.ndarray | None,
                  out: pathlib.Path, batch: int, log: logs.Log) -> int:
  """Makes what is not there of `wanted` and says how many that were."""
  devices = mesh.make(0)
  size = batch * devices.size
  batches = [wanted[start:start + size] for start in range(0, len(wanted), size)]
  todo = [batch for batch in batches if not all([is_there(out, image, settings) for image in batch])]
  if not todo:
    return 0
  graphdef, params = nnx.split(sd)
  shape = settings.height // sd.vae.factor, settings.width // sd.vae.factor, sd.latent_shape[-1]
  paint = compile_images(settings, sampler, graphdef, shape, devices, batch)
  frozen = jax.device_put((params, vectors_nd), mesh.replicated(devices))
  count = sum(map(len, todo))
  bar = log.progress(len(wanted), "images", done=len(wanted) - count)
  rows = lambda some: jax.device_put(rows_of(some, words, settings.negative, size), mesh.by_class(devices))
  with images.Writer() as writer:
    for some, pixels_bhwc in in_turn.behind((some, paint(frozen, rows(some))) for some in todo):
      for image, pixels_hwc in zip(some, np.asarray(pixels_bhwc)):
        writer.write(file_of(out, image), pixels_hwc, written(image, settings))
      bar.update(len(some))
  bar.close()
  return count


def generate(args: argparse.Namespace) -> None:
  """Makes what is missing of the images that the command line asks for; cheap checks come first."""
  log, out = logs.Log(None), pathlib.Path(args.out).expanduser()
  asked = read_prompts(args.prompt, args.prompts)
  path = download.locate(args.checkpoint, download.STABLE_DIFFUSION)
  denoiser = args.unet and download.locate(args.unet, download.DENOISER)
  vae = args.vae and download.locate(args.vae, download.AUTOENCODER)
  shortcuts.Shortcuts(args.guidance_until, args.cache_interval, args.cache_branch)  # raises
  schedule = stable_diffusion.load_schedule(path)
  sampler = diffusion.make_sampler(schedule, args.steps, args.sampler or None)
  words = tokenizer.Tokenizer.from_folder(stable_diffusion.tokenizer_folder(path))
  log.say(f"loading {args.checkpoint}")
  sd = stable_diffusion.load(path, denoiser=denoiser, vae=vae, dtype=args.dtype)
  log.say(f"on {logs.devices(jax.devices())} in {args.dtype}; what is compiled the first time takes a while")
  if args.cache_interval > 1 and args.cache_branch >= sd.unet.branches:
    raise ValueError(f"--cache_branch {args.cache_branch}: this UNet has the branches 0 to {sd.unet.branches - 1}")
  words, vectors_nd = read_tokens(args.tokens, words, sd)
  usual = sd.image_shape
  height, width = args.height or usual[0], args.width or usual[1]
  if height % sd.vae.factor or width % sd.vae.factor:
    raise ValueError(f"--height {height} and --width {width} must be multiples of {sd.vae.factor}")
  settings = Settings(args.checkpoint, args.unet, args.vae, args.tokens, args.negative, args.steps, args.sampler,
                      args.guidance, args.guidance_rescale, args.guidance_until, args.cache_interval, args.cache_branch,
                      height, width, args.dtype)
  wanted = list(itertools.product(asked, range(args.seed, args.seed + args.images)))
  made = paint_missing(wanted, settings, sd, sampler, words, vectors_nd, out, args.batch, log)
  log.say(f"{made} of {len(wanted)} images made now, in {out}")


def parser() -> argparse.ArgumentParser:
  """The flags."""
  new = argparse.ArgumentParser(prog="python -m digzsl_jax.generate", description="Text to image.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = new.add_argument
  add("--checkpoint", required=True, help="diffusers folder, single .safetensors file, or owner/name@revision")
  add("--out", required=True, help="folder for the images")
  add("--prompt", action="append", default=[], help="what to paint; may be given several times")
  add("--prompts", help="text file with a prompt in every line")
  add("--tokens", action="append", default=[], help="file of learnt tokens that prompts contain; several times")
  add("--negative", default="", help="what guidance leads away from")
  add("--seed", type=cli.at_least(0), default=0, help="of every prompt's first image; the next ones count up")
  add("--images", type=cli.at_least(1), default=1, help="for every prompt")
  add("--batch", type=cli.at_least(1), default=1, help="images that each device paints at once")
  add("--steps", type=cli.at_least(1), default=25, help="of the sampler")
  add("--sampler", default="", help='as "dpm++" or "euler_karras"; empty for the checkpoint\'s own')
  add("--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1, as SD-Turbo wants it, is off")
  add("--guidance_rescale", type=float, default=0.0, help="phi of arXiv 2305.08891, section 3.4")
  add("--guidance_until", type=float, default=1.0, help="share of the calls, from the first, that are guided")
  add("--cache_interval", type=cli.at_least(1), default=1, help="calls from one evaluation of the whole UNet to the "
      "next, which others take deep features from (DeepCache); 1 for exact images")
  add("--cache_branch", type=cli.at_least(0), default=0, help="of the UNet, up to which the other calls evaluate it")
  add("--height", type=cli.at_least(1), help="in pixels; by default what the checkpoint was trained on")
  add("--width", type=cli.at_least(1), help="in pixels; by default what the checkpoint was trained on")
  add("--dtype", choices=layers.DTYPES, default="float32", help="of the computation")
  add("--unet", help="folder of another denoiser, as one distilled for the sampler lcm")
  add("--vae", help="folder of another autoencoder, as TAESD's")
  return new


def main(arguments: Sequence[str]) -> None:
  """Runs the command line."""
  args = parser().parse_args(arguments)
  cli.start()
  with cli.answer_in_one_line("finished images are kept"):
    generate(args)


if __name__ == "__main__":
  main(sys.argv[1:])
