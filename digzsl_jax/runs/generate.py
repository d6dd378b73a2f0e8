"""Generates images of the unseen classes, with the learnt tokens and, on the same noise, without.

Images are addressed by class and index: `<task>/<source>/<class>/<index>.png`. Work goes in batches of a
fixed composition, and a batch whose files are all there is skipped, so a killed run goes on in the middle
of a class and ends with the same bytes. Every process writes the images that its own devices made.

Shapes: b row of a compiled body, k class, l prompt position, n vector of a token, h w pixel or latent position,
z latent channel, d text width.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import batches as in_turn
from digzsl_jax import checkpoint, diffusion, files, mesh, processes, shortcuts
from digzsl_jax.base_workspace import check
from digzsl_jax.data import images, prompts, splits
from digzsl_jax.models import stable_diffusion
from digzsl_jax.workspace import TOKENS, Workspace

NEEDS = ("tokens",)
MODELS = ("sd", "unet")
NOISE_STREAM = 2  # keeps the noise of generation apart from the noise of learning
FRESH_STREAM = 3  # and the noise that samplers draw on their way from both
SOURCES = ("learned", "plain")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How images are generated.

  Attributes:
    images: per class and source (N_gen).
    sampler: "ddim", "pndm", "dpm++", "euler", "euler_ancestral", "lcm" or a variant that `diffusion.make_sampler`
      names, "" for the checkpoint's own.
    steps: sampler steps.
    guidance: classifier-free guidance scale.
    batch: rows of one compiled body, so each device's share of a batch.
    unet: another denoiser for painting alone, as one distilled for few steps: the folder `unet` of the layout of
      diffusers; "" for that of `models.sd`, which tokens are learnt with in any case.
    guidance_until, cache_interval, cache_branch: work that is left out, see `shortcuts.Shortcuts`; none by default.
  """

  images: int
  sampler: str
  steps: int
  guidance: float
  batch: int
  unet: str = ""
  guidance_until: float = 1.0
  cache_interval: int = 1
  cache_branch: int = 0

  def __post_init__(self):
    for name in ("images", "steps", "batch"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
    self.shortcuts()  # raises

  def shortcuts(self) -> shortcuts.Shortcuts:
    """What is left out."""
    return shortcuts.Shortcuts(self.guidance_until, self.cache_interval, self.cache_branch)


class Rows(NamedTuple):
  """What one image is made from."""

  label_b: jax.Array  # class number in the data set, addresses the noise with the index
  index_b: jax.Array
  ids_bl: jax.Array
  token_bnd: jax.Array


class Job(NamedTuple):
  """One image to make."""

  source: str
  row: int  # among the task's unseen classes
  index: int


def plan(settings: Settings, ws: Workspace) -> diffusion.Sampler:
  """The sampler that `settings` choose, or the checkpoint's own."""
  return diffusion.make_sampler(ws.schedule, settings.steps, settings.sampler or ws.schedule.kind)


def compile_sampler(settings: Settings, seed: int, sampler: diffusion.Sampler, graphdef: nnx.GraphDef,
                    devices: jax.sharding.Mesh, keep: pathlib.Path | None = None):
  """The compiled `(frozen, rows) -> images` with `frozen = (params, ids of the empty prompt)`."""
  def noise(rows, shape, stream, *call):
    """By address (seed, class, image, call): the same in any batch, on any mesh."""
    root = jax.random.fold_in(jax.random.key(seed), stream)

    def one(label, index):
      return jax.random.normal(functools.reduce(jax.random.fold_in, (label, index, *call), root), shape)

    return jax.vmap(one)(rows.label_b, rows.index_b)

  def generate(frozen, rows):
    params, null_l = frozen
    sd = nnx.merge(graphdef, params)
    noise_bhwz = noise(rows, sd.latent_shape, NOISE_STREAM)
    fresh = lambda call: noise(rows, sd.latent_shape, FRESH_STREAM, call)
    text_bld = sd.text(rows.ids_bl, rows.token_bnd)
    return sd.pixels(shortcuts.sample(sd.unet, text_bld, sd.text(null_l[None]), settings.guidance, noise_bhwz, sampler,
                                      fresh, shortcuts=settings.shortcuts()))

  def blank(frozen, rows):
    return jnp.zeros((settings.batch, *nnx.merge(graphdef, frozen[0]).image_shape), jnp.uint8)

  return mesh.compile_chunked(generate, blank, devices, settings.batch, keep=keep)


def task_prompts(ws: Workspace, task: splits.Task, folder: pathlib.Path) -> dict[str, list]:
  """Label, prompt and token of every unseen class, by source; no prompt of `plain` has its token in it."""
  learned = checkpoint.read_arrays(folder / TOKENS[task.name])
  token_knd = [np.atleast_2d(learned[ws.dataset.names[label]]) for label in task.unseen]
  learnt_kl, plain_kl = ws.token_prompts(task)
  return {"learned": list(zip(task.unseen, learnt_kl, token_knd)), "plain": list(zip(task.unseen, plain_kl, token_knd))}


def batch_rows(jobs: list[Job], made: dict[str, list], size: int) -> Rows:
  """Rows of one batch; the last batch is filled up with copies of its last row, which are thrown away."""
  jobs = jobs + jobs[-1:] * (size - len(jobs))
  label_b, ids_bl, token_bnd = map(np.array, zip(*(made[job.source][job.row] for job in jobs)))
  return Rows(label_b, np.array([job.index for job in jobs]), ids_bl, token_bnd)


def generate_task(settings: Settings, ws: Workspace, task: splits.Task, generate, frozen, folder: pathlib.Path) -> dict:
  """Makes what is missing of a task's images and writes its manifest."""
  names = [ws.dataset.names[label] for label in task.unseen]
  made = task_prompts(ws, task, ws.folder("tokens"))
  jobs = [Job(*job) for job in itertools.product(SOURCES, range(len(names)), range(settings.images))]
  path = lambda job: folder / task.name / job.source / prompts.slug(names[job.row]) / f"{job.index:05d}.png"
  size = settings.batch * ws.mesh.size
  # Batches start at multiples of the mesh-wide size: rows of a body stay `batch` whatever the mesh.
  batches = [jobs[start:start + size] for start in range(0, len(jobs), size)]
  missing = lambda: [row for row, batch in enumerate(batches) if not all(path(job).exists() for job in batch)]
  todo = [batches[row] for row in processes.told(missing)]
  bar = ws.log.progress(len(jobs), f"generate ({task.name})", done=len(jobs) - sum(map(len, todo)))
  rows = lambda batch: mesh.place(batch_rows(batch, made, size), mesh.by_class(ws.mesh))
  with images.Writer() as writer:
    for batch, images_bhwc in in_turn.behind((batch, generate(frozen, rows(batch))) for batch in todo):
      for shard in images_bhwc.addressable_shards:
        for job, image_hwc in zip(batch[shard.index[0]], np.asarray(shard.data)):
          writer.write(path(job), image_hwc)
      bar.update(len(batch))
  bar.close()
  processes.meet()
  if not processes.is_first():
    return {}
  for job in itertools.chain(*todo):
    processes.await_file(path(job))
  paths = {source: {name: [] for name in names} for source in SOURCES}
  for job in jobs:
    paths[job.source][names[job.row]].append(str(path(job).relative_to(folder / task.name)))
  manifest = {"classes": names, "images": settings.images, "sources": list(SOURCES), "seed": ws.seed, "files": paths}
  files.write_json(folder / task.name / "manifest.json", manifest)
  return {"images": len(jobs), "made_now": sum(map(len, todo))}


def prepare(settings: Settings, ws: Workspace):
  """The compiled sampler and what it reads."""
  graphdef, params = nnx.split(ws.painter)
  frozen = mesh.place_models((params, jnp.asarray(ws.sd_tokenizer([""])[0])), ws.mesh)
  keep = ws.stages["generate"].programs
  return compile_sampler(settings, ws.seed, plan(settings, ws), graphdef, ws.mesh, keep), frozen


def lower(settings: Settings, ws: Workspace) -> dict[str, jax.stages.Lowered]:
  """The sampler for `--dry_run`: lowered, not run."""
  generate, frozen = prepare(settings, ws)
  rows, length = settings.batch * ws.mesh.size, ws.sd_tokenizer.length
  token_nd = ws.token_starts(ws.tasks["test"])[0]
  whole = Rows(*(np.zeros((rows, *shape), np.int32) for shape in ((), (), (length,))), np.tile(token_nd, (rows, 1, 1)))
  return {"sample": generate.lower(frozen, mesh.place(whole, mesh.by_class(ws.mesh)))}


def validate(settings: Settings, ws: Workspace) -> None:
  """Raises ValueError for a sampler that the checkpoint's schedule does not allow, or a UNet that does not fit."""
  plan(settings, ws)
  if settings.unet:
    stable_diffusion.check_denoiser(ws.model_paths["sd"], ws.model_paths["unet"])
  if settings.cache_interval > 1:
    last = ws.painter.unet.branches - 1
    check(settings.cache_branch <= last, "config.generate.cache_branch", settings.cache_branch, f"at most {last}")


def complete(ws: Workspace, folder: pathlib.Path) -> bool:
  """Whether every image that the manifests list is there; what is missing is made again."""
  manifests = [folder / name / "manifest.json" for name in ws.tasks]
  return all(path.exists() for path in manifests) and all(
      (path.parent / file).exists() for path in manifests for of_class in files.read_json(path)["files"].values()
      for made in of_class.values() for file in made)


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict:
  """Generates for both tasks."""
  generate, frozen = prepare(settings, ws)
  return {name: generate_task(settings, ws, task, generate, frozen, folder) for name, task in ws.tasks.items()}
