"""Learns one token per unseen class: a vector S*, or several, whose samples the guide recognises as that class.

Only S* is trained and every weight is shared, so class is simply batch: a slot holds one class, all slots
learn at once, and a slot whose class has finished takes the next one. No class ever sees another.

An update of a slot (arXiv 2412.17219, section 3; its parent method is arXiv 2303.17155):
  1. `prefix`: sample `images` latents without gradient up to the last denoiser calls,
  2. `learn`: make those calls, decode, embed with the guide, take the cross-entropy over the unseen classes of
     cos / temperature, and let AdamW move the slot's token by its own clipped gradient.

Gradient paths: `last` differentiates the last `grad_calls` calls of a whole sampling; `x0` stops at a chosen noise
level and decodes the denoiser's direct prediction there, one call.

Shapes: s slot of a compiled body, c slot, b row (slot, image), k unseen class of the task, n vector of a token,
h w latent position, z latent channel, l prompt position, d text width.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from digzsl_jax import checkpoint, diffusion, files, fsdp, losses, mesh, processes
from digzsl_jax.base_workspace import check
from digzsl_jax.data import prompts, splits, textual_inversion
from digzsl_jax.models import cdm, stable_diffusion
from digzsl_jax.workspace import TOKENS, Workspace

NEEDS = ("cdm",)
MODELS = ("clip", "encoder", "sd", "initial_file")
NOISE_STREAM = 1  # keeps the noise of learning apart from the noise of generation
REASONS = ("running", "accuracy", "patience", "cap", "nan")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How tokens are learnt.

  Attributes:
    template: prompt with `{token}` and `{name}`.
    initial: word whose embedding every vector of S* starts from; it stands in the place of S* in plain prompts.
    initial_file: textual-inversion file that S* starts from instead, "" for none: of one token for every class, or
      of every unseen class by name, as `learned_embeds.safetensors`; validation classes it lacks start from the word.
    vectors: of S*, at consecutive positions, learnt together.
    guide: "cdm", or "clip" for the ablation without it: the run's own CLIP as it is, and its text prototypes.
    gradient: "last" or "x0".
    sampler: "ddim", "pndm", "dpm++", "euler" or a variant of these without new noise for `last`, "" for the
      checkpoint's own; `x0` walks by DDIM.
    steps: sampler steps for `last`; denoiser calls for `x0`, the last of them at `x0_timestep`.
    grad_calls: calls that carry gradient in `last`; 0 for what the reference in effect does: 2 with PNDM, else 1.
    x0_timestep: noise level of `x0`'s differentiated call.
    guidance: classifier-free guidance scale.
    stop_unconditional: no gradient through the unconditional half. Exact for one differentiated call; with
      more it drops the path through the latent, so parity with the reference needs False.
    images: images of a class in one update.
    learning_rate, weight_decay: of AdamW.
    clip_norm: a class's gradient is scaled down to this norm.
    temperature: divides the cosines; the paper shows none (1).
    noise_period: 0 keeps the first update's noise, as the reference; n draws anew every n updates.
    stop_accuracy: gamma; a class whose images are recognised at a higher rate stops. 1 never stops.
    patience: a class stops when this many updates and one more brought no lower loss.
    max_updates: cap.
    slots: classes learnt at once.
    slots_per_body: slots that one compiled body works on, one body after another on each device. Fixed rows
      make tokens equal on every mesh.
    grad_images: images of a class that are differentiated at once, 0 for all: fewer take less memory.
    check_every: updates between looks at the losses, refills and saved states.
    remat: recompute the denoiser's and decoder's activations on the way back, to save memory.
  """

  template: str
  initial: str
  initial_file: str
  vectors: int
  guide: str
  gradient: str
  sampler: str
  steps: int
  grad_calls: int
  x0_timestep: int
  guidance: float
  stop_unconditional: bool
  images: int
  learning_rate: float
  weight_decay: float
  clip_norm: float
  temperature: float
  noise_period: int
  stop_accuracy: float
  patience: int
  max_updates: int
  slots: int
  slots_per_body: int
  grad_images: int
  check_every: int
  remat: bool

  def __post_init__(self):
    prompts.check_template(self.template, token=True, field="template")
    check(self.guide in cdm.GUIDES, "guide", self.guide, f"one of {cdm.GUIDES}")
    check(self.gradient in ("last", "x0"), "gradient", self.gradient, "'last' or 'x0'")
    for name in ("vectors", "steps", "images", "max_updates", "slots", "slots_per_body", "check_every"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
    for name in ("learning_rate", "clip_norm", "temperature"):
      check(getattr(self, name) > 0, name, getattr(self, name), "positive")
    check(self.sampler in ("", "ddim") or self.gradient == "last", "sampler", self.sampler,
          "'ddim' for the gradient path 'x0', which walks by it")
    check(self.grad_calls in (0, 1) or self.gradient == "last", "grad_calls", self.grad_calls,
          "0 or 1 for the gradient path 'x0', which differentiates one call")
    check(self.grad_calls >= 0, "grad_calls", self.grad_calls, "0 (as the reference) or more")
    check(self.images % (self.grad_images or 1) == 0, "grad_images", self.grad_images, "0 or a divisor of images")
    check(0 <= self.stop_accuracy <= 1, "stop_accuracy", self.stop_accuracy, "between 0 and 1")
    check(min(counts := (self.noise_period, self.patience, self.grad_images)) >= 0,
          "noise_period, patience or grad_images", counts, "0 or more")


class Path(NamedTuple):
  """A gradient path: the sampler, where its differentiated part begins, and that part."""

  sampler: diffusion.Sampler
  cut: int
  finish: Callable[[diffusion.Denoise, diffusion.Carry], jax.Array]  # latents (x0)


def gradient_path(settings: Settings, schedule: diffusion.Schedule) -> Path:
  """The sampler that `settings` choose, cut where gradient begins."""
  if settings.gradient == "x0":
    last = len(schedule.alphas_cumprod) - 1
    check(0 <= settings.x0_timestep <= last, "x0_timestep", settings.x0_timestep, f"between 0 and {last}")
    times = np.linspace(last, settings.x0_timestep, settings.steps + (settings.steps == 1))[-settings.steps:]
    sampler = diffusion.make_sampler(schedule, None, "ddim", timesteps=times.round().astype(int))
    cut = sampler.calls - 1
    return Path(sampler, cut, lambda denoise, carry: sampler.predict_x0(denoise, carry, cut))
  kind = settings.sampler or schedule.kind
  sampler = diffusion.make_sampler(schedule, settings.steps, kind)
  check(not sampler.stochastic, "sampler", kind, "one that draws no new noise, as 'ddim', 'pndm', 'dpm++' or 'euler'")
  grad_calls = settings.grad_calls or (2 if kind == "pndm" else 1)
  check(grad_calls <= sampler.calls, "grad_calls", grad_calls, f"at most {sampler.calls}, the calls that {kind} "
        f"makes for steps={settings.steps}")
  cut = sampler.calls - grad_calls
  return Path(sampler, cut, lambda denoise, carry: sampler.run(denoise, carry, cut, sampler.calls).x_bhwz)


class Guide(nnx.Module):
  """The frozen models of token learning: Stable Diffusion and the CDM, trained or not, that judges its images."""

  def __init__(self, sd: stable_diffusion.StableDiffusion, discriminator: cdm.CDM):
    self.sd = sd
    self.cdm = discriminator


class Classes(NamedTuple):
  """The unseen classes of a task; every leaf but `null_l` leads with k."""

  label_k: jax.Array  # number in the data set: addresses the noise
  allowed_k: jax.Array  # False for rows that only fill up to the size of the largest task
  ids_kl: jax.Array  # prompt with the token in it: ids beyond the vocabulary
  prototypes_kd: jax.Array
  null_l: jax.Array  # empty prompt


class Slots(NamedTuple):
  """What is being learnt; every leaf leads with c."""

  class_c: jax.Array  # row of `Classes`, -1 for an idle slot
  step_c: jax.Array
  left_c: jax.Array  # updates without improvement that are still allowed
  reason_c: jax.Array  # number in REASONS
  token_cnd: jax.Array
  best_cnd: jax.Array
  best_loss_c: jax.Array
  best_step_c: jax.Array
  optimiser: optax.OptState


class Update(NamedTuple):
  """What an update of each slot showed; `made_c` is False for slots that were not live."""

  made_c: jax.Array
  loss_c: jax.Array
  accuracy_c: jax.Array


class Outcome(NamedTuple):
  """What a task has so far; every leaf leads with k. Loss curves hold NaN where no update was made."""

  done_k: np.ndarray
  token_knd: np.ndarray
  reason_k: np.ndarray
  best_step_k: np.ndarray
  loss_ku: np.ndarray
  accuracy_ku: np.ndarray


def optimiser(settings: Settings) -> optax.GradientTransformation:
  """Of one token, all its vectors: clipping sees the gradient of its class alone, and only once it exists."""
  return optax.chain(optax.clip_by_global_norm(settings.clip_norm),
                     optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay))


def fresh_slots(settings: Settings, class_c: np.ndarray, start_knd: np.ndarray) -> Slots:
  """Slots at their first update, each with the start of its class; `class_c` of -1 makes an idle one."""
  class_c, count = jnp.asarray(class_c, jnp.int32), len(class_c)
  token_cnd = jnp.asarray(start_knd)[class_c]
  zeros = jnp.zeros(count, jnp.int32)
  return Slots(class_c, zeros, jnp.full(count, settings.patience, jnp.int32), zeros, token_cnd, token_cnd,
               jnp.full(count, np.inf, jnp.float32), zeros, jax.vmap(optimiser(settings).init)(token_cnd))


def spare_slots(settings: Settings, devices: jax.sharding.Mesh) -> int:
  """How many idle slots fill the last body of every device."""
  return -settings.slots % (devices.size * settings.slots_per_body)


def live(slots: Slots) -> jax.Array:
  """Which slots hold a class that has not stopped, `[c]`."""
  return (slots.class_c >= 0) & (slots.reason_c == 0)


def noise(settings: Settings, seed: int, classes: Classes, slots: Slots, shape: tuple[int, int, int]) -> jax.Array:
  """Noise by address (seed, class, draw): the same on any mesh, in any slot, after any resume."""
  draw_s = slots.step_c // settings.noise_period if settings.noise_period else jnp.zeros_like(slots.step_c)
  root = jax.random.fold_in(jax.random.key(seed), NOISE_STREAM)

  def one(label, draw):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(root, label), draw), (settings.images, *shape))

  return jax.vmap(one)(classes.label_k[slots.class_c], draw_s).reshape(-1, *shape)


def denoiser(settings: Settings, sd: stable_diffusion.StableDiffusion, classes: Classes, class_b: jax.Array,
             token_bnd: jax.Array) -> diffusion.Denoise:
  """The guided denoiser of rows of classes, each with its own token."""
  text_bld = sd.text(classes.ids_kl[class_b], token_bnd)
  return diffusion.guide(sd.unet, text_bld, sd.text(classes.null_l[None]), settings.guidance,
                         settings.stop_unconditional)


class Frozen(NamedTuple):
  """What every slot reads and none changes."""

  params: nnx.State
  classes: Classes


def compile_steps(settings: Settings, seed: int, path: Path, graphdef: nnx.GraphDef, devices: jax.sharding.Mesh,
                  keep: pathlib.Path | None = None):
  """The two compiled steps, `prefix(frozen, slots) -> carry` and `learn(frozen, slots, carry) -> slots, metrics`."""
  rows, tx = lambda x, images=settings.images: jnp.repeat(x, images, axis=0), optimiser(settings)
  part = settings.grad_images or settings.images
  # Of divided weights one call for both halves: two would gather them twice.
  walk = dataclasses.replace(settings, stop_unconditional=False) if fsdp.AXIS in devices.axis_names else settings

  def prefix(frozen, slots):
    sd = nnx.merge(graphdef, frozen.params).sd
    x_bhwz = noise(settings, seed, frozen.classes, slots, sd.latent_shape)
    denoise = denoiser(walk, sd, frozen.classes, rows(slots.class_c), rows(slots.token_cnd))
    return path.sampler.run(denoise, path.sampler.start(x_bhwz), 0, path.cut)

  def learn(frozen, slots, carry):
    guide, classes, class_b = nnx.merge(graphdef, frozen.params), frozen.classes, rows(slots.class_c, part)

    def loss(token_snd, carry):
      denoise = denoiser(settings, guide.sd, classes, class_b, rows(token_snd, part))
      embeds_bd = guide.cdm(guide.sd.decode(path.finish(denoise, carry)))
      loss_b, cosines_bk = losses.cosine_cross_entropy(embeds_bd, classes.prototypes_kd, class_b,
                                                       settings.temperature, classes.allowed_k)
      loss_s, hit_s = (x.reshape(-1, part).mean(1) for x in (loss_b, cosines_bk.argmax(-1) == class_b))
      return loss_s.sum(), (loss_s, hit_s)  # only summed: a token's gradient is that of its class

    gradient = lambda carry: jax.grad(loss, has_aux=True)(slots.token_cnd, carry)
    grad_snd, (loss_s, hit_s) = mesh.mean_of_parts(gradient, carry, len(slots.class_c), settings.images // part)
    return update(settings, tx, slots, grad_snd, loss_s, hit_s), Update(live(slots), loss_s, hit_s)

  def no_images(frozen, slots):
    rows = slots.class_c.shape[0] * settings.images
    return path.sampler.start(jnp.zeros((rows, *nnx.merge(graphdef, frozen.params).sd.latent_shape)))

  def unchanged(frozen, slots, carry):
    return slots, Update(live(slots), *[jnp.zeros_like(slots.best_loss_c)] * 2)

  busy = lambda slots, *carry: live(slots).any()
  return tuple(mesh.compile_chunked(function, idle, devices, settings.slots_per_body, busy, keep)
               for function, idle in ((prefix, no_images), (learn, unchanged)))


def update(settings: Settings, tx: optax.GradientTransformation, slots: Slots, grad_snd: jax.Array, loss_s: jax.Array,
           hit_s: jax.Array) -> Slots:
  """One update per slot and its stopping rules; slots that are not live stay as they are."""
  finite_s = jnp.isfinite(loss_s) & jnp.isfinite(grad_snd).all((1, 2))
  delta_snd, optimiser_state = jax.vmap(tx.update)(grad_snd, slots.optimiser, slots.token_cnd)
  better_s = finite_s & (loss_s < slots.best_loss_c)
  left_s = jnp.where(better_s, settings.patience, slots.left_c - 1)
  capped_s = slots.step_c + 1 >= settings.max_updates
  reason_s = jnp.select([~finite_s, hit_s > settings.stop_accuracy, left_s < 0, capped_s],
                        [REASONS.index(name) for name in ("nan", "accuracy", "patience", "cap")], 0)
  new = Slots(slots.class_c, slots.step_c + 1, left_s, reason_s.astype(jnp.int32),
              jnp.where(finite_s[:, None, None], slots.token_cnd + delta_snd, slots.token_cnd),
              jnp.where(better_s[:, None, None], slots.token_cnd, slots.best_cnd),
              jnp.where(better_s, loss_s, slots.best_loss_c),
              jnp.where(better_s, slots.step_c, slots.best_step_c), optimiser_state)
  keep_s = live(slots)
  return jax.tree.map(lambda a, b: jnp.where(keep_s.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, slots)


def task_classes(settings: Settings, ws: Workspace, task: splits.Task) -> Classes:
  """Prompts and prototypes of the task's unseen classes, filled up so that all tasks share one compilation."""
  rows = max(len(other.unseen) for other in ws.tasks.values())
  filled_k = np.resize(np.arange(len(task.unseen)), rows)
  learnt_kl, _ = ws.token_prompts(task)
  labels_k = np.array(task.unseen)[filled_k]
  allowed_k = np.arange(rows) < len(task.unseen)
  prototypes_kd = ws.text_prototypes_kd if settings.guide == cdm.CLIP else ws.prototypes_kd
  return jax.tree.map(jnp.asarray, Classes(labels_k, allowed_k, learnt_kl[filled_k], prototypes_kd[labels_k],
                                           ws.sd_tokenizer([""])[0]))


def empty_outcome(settings: Settings, start_knd: np.ndarray) -> Outcome:
  """An outcome in which no class has finished."""
  curve = np.full((len(start_knd), settings.max_updates), np.nan, np.float32)
  zeros = np.zeros(len(start_knd), np.int32)
  return Outcome(zeros, np.zeros_like(start_knd), zeros.copy(), zeros.copy(), curve, curve.copy())


def collect(outcome: Outcome, slots: Slots, next_class: int, settings: Settings, start_knd: np.ndarray, log, names):
  """Moves finished classes from their slots into `outcome` and refills; `(slots, next_class)`."""
  class_c, reason_c = np.array(slots.class_c), np.asarray(slots.reason_c)
  finished = np.flatnonzero((class_c >= 0) & (reason_c > 0))
  for slot in finished:
    k = class_c[slot]
    outcome.done_k[k], outcome.reason_k[k] = 1, reason_c[slot]
    outcome.token_knd[k], outcome.best_step_k[k] = slots.best_cnd[slot], slots.best_step_c[slot]
    if REASONS[reason_c[slot]] == "nan":
      log.warn(f"class {names[k]!r}: loss or gradient was not finite at update {int(slots.step_c[slot])}; "
               "kept its best token")
    class_c[slot], next_class = (next_class, next_class + 1) if next_class < len(names) else (-1, next_class)
  if len(finished):
    fresh, new = fresh_slots(settings, class_c, start_knd), np.isin(np.arange(len(class_c)), finished)
    slots = jax.tree.map(lambda a, b: jnp.where(new.reshape(-1, *(1,) * (a.ndim - 1)), a, b), fresh, slots)
  return slots, next_class


def learn_task(settings: Settings, ws: Workspace, task: splits.Task, learner: "Learner",
               folder: pathlib.Path) -> Outcome:
  """Feeds the task's classes through the slots; resumes bit for bit from the last state that was saved."""
  names = [ws.dataset.names[label] for label in task.unseen]
  start_knd, frozen = ws.token_starts(task), learner.frozen(task)
  slots = fresh_slots(settings, np.where((first := np.arange(settings.slots)) < len(names), first, -1), start_knd)
  outcome, next_class = empty_outcome(settings, start_knd), min(settings.slots, len(names))
  state_file = folder / f"{task.name}_state.safetensors"
  if (saved := checkpoint.resume_state(state_file, (slots, outcome, np.int32(next_class)))) is not None:
    slots, outcome, next_class = saved[0], saved[1], int(saved[2])
  bar = ws.log.progress(len(names), f"tokens ({task.name})", done=int(outcome.done_k.sum()))
  idle = fresh_slots(settings, np.full(spare_slots(settings, ws.mesh), -1), start_knd)
  while not outcome.done_k.all():
    class_c, step_c = np.asarray(slots.class_c), np.asarray(slots.step_c)
    filled = jax.tree.map(lambda *leaves: np.concatenate(leaves), slots, idle)
    slots, history = mesh.place(filled, mesh.by_class(ws.mesh)), []
    for _ in range(settings.check_every):
      slots, made = learner.learn(frozen, slots, learner.prefix(frozen, slots))
      history.append(made)
    history, slots = mesh.fetch((history, slots))
    for ahead, made in enumerate(history):
      for slot in np.flatnonzero(made.made_c):
        place = class_c[slot], step_c[slot] + ahead
        outcome.loss_ku[place], outcome.accuracy_ku[place] = made.loss_c[slot], made.accuracy_c[slot]
    slots = jax.tree.map(lambda leaf: leaf[:settings.slots], slots)
    slots, next_class = collect(outcome, slots, next_class, settings, start_knd, ws.log, names)
    checkpoint.save_state(state_file, (slots, outcome, np.int32(next_class)))
    bar.update(int(outcome.done_k.sum()) - bar.n)
    if made.made_c.any():
      loss, accuracy = (float(leaf_c[made.made_c].mean()) for leaf_c in (made.loss_c, made.accuracy_c))
      bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
      ws.log.metrics(f"tokens ({task.name})", int(np.isfinite(outcome.accuracy_ku).sum()), loss=loss, accuracy=accuracy)
  bar.close()
  return outcome


def write_outcome(outcome: Outcome, names: list[str], task: str, folder: pathlib.Path) -> dict:
  """Tokens by class name (`[d]`, or `[n, d]` of several vectors), as files for diffusers too, and learning curves."""
  vectors = outcome.token_knd.squeeze(1) if outcome.token_knd.shape[1] == 1 else outcome.token_knd
  checkpoint.write_arrays(folder / TOKENS[task], dict(zip(names, vectors)))
  if task == "test":
    for name, token_nd in zip(names, outcome.token_knd):
      slug = prompts.slug(name)
      textual_inversion.write(folder / "textual_inversion" / f"{slug}.safetensors", f"<{slug}>", token_nd)
  curves = {}
  for k, name in enumerate(names):
    made = int(np.isfinite(outcome.accuracy_ku[k]).sum())
    losses_u = [loss if np.isfinite(loss) else None for loss in outcome.loss_ku[k, :made].tolist()]  # JSON has no NaN
    curves[name] = {"loss": losses_u, "accuracy": outcome.accuracy_ku[k, :made].tolist(),
                    "stopped": REASONS[outcome.reason_k[k]], "best_step": int(outcome.best_step_k[k])}
  files.write_json(folder / f"{task}_curves.json", curves)
  first, best = (np.nanmean(loss_k) for loss_k in (outcome.loss_ku[:, 0], np.fmin.reduce(outcome.loss_ku, axis=1)))
  return {"classes": len(names), "first_loss": round(float(first), 4), "best_loss": round(float(best), 4),
          "updates": sum(len(curve["loss"]) for curve in curves.values()),
          "stopped": {name: int((outcome.reason_k == i).sum()) for i, name in enumerate(REASONS) if i}}


class Learner:
  """The compiled steps and what they read; one compilation serves every task."""

  def __init__(self, settings: Settings, ws: Workspace, discriminator: Callable[[str], cdm.CDM]):
    """`discriminator` gives the CDM of a task's name; it is not asked where the guide is "clip"."""
    self.settings, self.ws, self.discriminator = settings, ws, discriminator
    path, graphdef = gradient_path(settings, ws.schedule), self._graphdef_and_params("test")[0]
    self.prefix, self.learn = compile_steps(settings, ws.seed, path, graphdef, ws.mesh, ws.stages["tokens"].programs)

  def _graphdef_and_params(self, task: str) -> tuple[nnx.GraphDef, nnx.State]:
    untrained = self.settings.guide == cdm.CLIP
    guide = cdm.zero_shot(self.ws.clip, self.ws.model_paths["clip"]) if untrained else self.discriminator(task)
    return nnx.split(Guide(self.ws.sd, guide))

  def frozen(self, task: splits.Task) -> Frozen:
    """A task's classes, and the frozen models with its own CDM."""
    frozen = Frozen(self._graphdef_and_params(task.name)[1], task_classes(self.settings, self.ws, task))
    return mesh.place_models(frozen, self.ws.mesh)


def lower(settings: Settings, ws: Workspace) -> dict[str, jax.stages.Lowered]:
  """The steps for `--dry_run`: lowered for the test task, not run."""
  learner, task = Learner(settings, ws, lambda _: cdm.CDM(ws.cdm_encoder, ws.new_cdm_head())), ws.tasks["test"]
  slots = fresh_slots(settings, np.zeros(settings.slots + spare_slots(settings, ws.mesh)), ws.token_starts(task))
  slots, frozen = mesh.place(slots, mesh.by_class(ws.mesh)), learner.frozen(task)
  prefix = learner.prefix.lower(frozen, slots)
  return {"prefix": prefix, "learn": learner.learn.lower(frozen, slots, prefix.out_info)}


def validate(settings: Settings, ws: Workspace) -> None:
  """Raises ValueError for what would fail only after the stages before this one."""
  gradient_path(settings, ws.schedule)
  list(map(ws.token_prompts, ws.tasks.values()))
  ws.file_starts()


def run(settings: Settings, ws: Workspace, folder: pathlib.Path) -> dict:
  """Learns the tokens of both tasks; `learned_embeds.safetensors` holds those of the test task."""
  learner, results = Learner(settings, ws, lambda task: cdm.load(ws.cdm_encoder, ws.cdm_head(task))), {}
  for name, task in ws.tasks.items():
    outcome = learn_task(settings, ws, task, learner, folder)
    if processes.is_first():
      results[name] = write_outcome(outcome, [ws.dataset.names[label] for label in task.unseen], name, folder)
      ws.log.say(f"tokens ({name}): {results[name]}")
  return results
