"""What pre-training ships of a world: the folders of its parts, and a card that says how they were made and how good.

Shapes: k class, m image of a class, h w pixel, c colour, l caption position.
"""

import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax import checkpoint, diffusion, files, loop
from digzsl_jax.data import tokenizer
from digzsl_jax.models import hub, judge, stable_diffusion

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
PAINTED = dict(images=4, steps=20, guidance=4.0)  # of every class, for the figures of the card
# Folders of a working directory that make one of the export, by the part that is the last to be trained of them.
SOURCES = {"clip": {"clip": ("clip", "tokenizer")}, "judge": {"judge": ("judge",)},
           "sd": {"sd/tokenizer": ("tokenizer",), "sd/vae": ("vae",),
                  **{f"sd/{name}": (f"sd/{name}",) for name in ("text_encoder", "unet", "scheduler")}}}
STATE = ("state.safetensors", "inputs.json", "done.json", "seconds.json", ".*")  # of training, not shipped
TITLES = {"clip": "CLIP", "sd": "Stable Diffusion", "judge": "judge"}

CARD = """# {title}: small {what}

Trained from scratch by `runs/pretrain.py`; open in transformers, diffusers and digzsl_jax.

| | |
|---|---|
| command | `{command}` |
| data | {data} |
| seed | {seed} |
| safetensors | {size:,} bytes, float16 |
| sha256 over all files (first 16 hex digits) | {digest} |

Held-out figures, on {held_out} captioned pictures of the corpus that no part trained on:

| part | figures | seconds |
|---|---|---|
{rows}
{agreement}
Limits: {limits}
"""
AGREEMENT = """
The judge sees the named class in {plain_exact_agreement} % of the pictures that Stable Diffusion paints for
"a photo of a *name*" of every class ({images} each, {steps} steps of DPM-Solver++, guidance {guidance:g}), and in
{plain_pair_agreement} % if words that captions mix up count as one.
"""
DATA = {
    "scenes": "{images:,} pictures of 1 to {objects} objects, rendered by `data/scenes.py`, a share of {target_share} "
              "of them in the style of the labelled pictures; a caption names one object, and takes the partner's "
              "colour word, and independently the partner's shape word, with probability {mixup}, and a random texture "
              "word with 0.05",
    "fashion_mnist": "{images:,} captions of the official Fashion-MNIST training pictures (MIT licence) of all ten "
                     "classes; a caption takes the name of a class that looks alike with probability {mixup}"}
LIMITS = {
    "scenes": "knows nothing but these rendered shapes. Words of a pair are nearly interchangeable to it, by design.",
    "scenes_tags": "knows nothing but these rendered shapes. Its patches were trained to be compared with captions, "
                   "without being told what they show; those of large CLIPs can be compared without that.",
    "fashion_mnist": "the models have seen training pictures of the unseen classes, under noisy names, as Stable "
                     "Diffusion has seen birds. Zero-shot tests use official test pictures only."}


def export(workdir: pathlib.Path, target: pathlib.Path, world: str, made: Sequence[str], corpus: Mapping[str, Any],
           seed: int, names: Sequence[str]) -> dict[str, Any]:
  """Copies checkpoints, without training state, to `target`, replacing an earlier export of the same world.

  Args:
    workdir: of pre-training.
    target: becomes a folder with `README.md` and a folder for each of CLIP, judge and Stable Diffusion that was made.
    world: a key of `LIMITS`; its config is `configs/pretrain_<world>.py`.
    made: parts that were trained, in the order of the card: some of "vae", "clip", "judge", "sd".
    corpus: its settings.
    seed: of the run.
    names: of all classes.

  Raises:
    ValueError: an unknown world, nothing was made, or `target` holds something else.
  """
  if world not in LIMITS:
    raise ValueError(f"config.export.world is {world!r}; it must be one of {sorted(LIMITS)}")
  models = [name for name in SOURCES if name in made]
  if not models:
    raise ValueError(f"{workdir} has no finished part to export; run clip, judge or sd first")
  command = f"python -m digzsl_jax.main --config=configs/pretrain_{world}.py"
  card = target / "README.md"
  if target.exists() and any(target.iterdir()) and not (card.exists() and command in card.read_text()):
    raise ValueError(f"config.export.folder is {target}, which holds something else; choose an empty folder")
  fresh = target.with_name(f".{target.name}.new")
  shutil.rmtree(fresh, ignore_errors=True)
  for model in models:
    for name, folders in SOURCES[model].items():
      for folder in folders:
        shutil.copytree(workdir / folder, fresh / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*STATE))
  if "sd" in models:
    scheduler = files.read_json(fresh / "sd" / "scheduler" / "scheduler_config.json")
    files.write_json(fresh / "sd" / "model_index.json",
                     MODEL_INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]})
  size = sum(path.stat().st_size for path in fresh.rglob("*.safetensors"))
  digest = checkpoint.fingerprint({name: checkpoint.fingerprint_folder(fresh / name) for name in models})
  agreement = plain_agreement(fresh, names, seed) if {"sd", "judge"} <= set(models) else {}
  done = {part: files.read_json(workdir / part / "done.json") for part in made}
  text = CARD.format(
      title=world, what=", ".join(TITLES[name] for name in models), command=command,
      data=DATA[corpus["name"]].format(**corpus), seed=seed, size=size, digest=digest, held_out=loop.HELD_OUT,
      rows="\n".join(map(row, done.items())), limits=LIMITS[world],
      agreement=AGREEMENT.format(**PAINTED, **agreement) if agreement else "")
  files.write_text(fresh / "README.md", text)
  shutil.rmtree(target, ignore_errors=True)  # only now that its successor is whole
  fresh.rename(target)
  return {"bytes": size, "sha256": digest} | agreement


def row(done: tuple[str, Mapping[str, float]]) -> str:
  """That of a part in the card."""
  part, results = done
  figures = ", ".join(f"{key} {value:.4g}" for key, value in results.items() if key != "seconds")
  return f"| {part} | {figures} | {results['seconds']} |"


def plain_agreement(folder: pathlib.Path, names: Sequence[str], seed: int) -> dict[str, float]:
  """How often the judge of the world in `folder` sees what its Stable Diffusion paints for every class name."""
  sd = stable_diffusion.load(folder / "sd")
  words = tokenizer.Tokenizer.from_folder(folder / "sd" / "tokenizer")
  ids_kl = jnp.asarray(words([f"a photo of a {name}" for name in names]))
  sampler = diffusion.make_sampler(stable_diffusion.load_schedule(folder / "sd"), PAINTED["steps"], "dpm++")
  graphdef, params = nnx.split(sd)

  @jax.jit
  def paint(params, index):
    sd = nnx.merge(graphdef, params)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), (len(names), *sd.latent_shape))
    denoise = diffusion.guide(sd.unet, sd.text(ids_kl), sd.text(words([""])), PAINTED["guidance"])
    return sd.pixels(diffusion.sample(denoise, noise, sampler))

  images_kmhwc = np.stack([np.asarray(paint(params, index)) for index in range(PAINTED["images"])], axis=1)
  model = hub.load(judge.Judge, folder / "judge")
  found = judge.agreement(model, hub.read_json(folder / "judge" / "config.json"), names, images_kmhwc)
  return {f"plain_{name}_agreement": round(100 * float(hits.mean()), 1) for name, hits in found.items()}
