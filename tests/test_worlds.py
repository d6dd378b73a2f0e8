"""The worlds that ship with the package: whole, small, and described by their cards."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy

from digzsl_jax import checkpoint
from digzsl_jax.base_workspace import WORLDS, resolve
from digzsl_jax.data import tokenizer
from digzsl_jax.models import clip, hub, judge, stable_diffusion

NAMES = sorted(folder.name for folder in WORLDS.glob("*/"))
each_world = pytest.mark.parametrize("world", NAMES)
MODELS = ("clip", "judge", "sd")
MADE = {name: [model for model in MODELS if (WORLDS / name / model).is_dir()] for name in NAMES}


def test_the_quickstarts_worlds_ship():
  assert MADE["scenes"] == MADE["fashion_mnist"] == [*MODELS] and MADE["scenes_tags"] == ["clip"]


@pytest.mark.parametrize("world", [name for name in NAMES if MADE[name] == [*MODELS]])
def test_models_load_and_fit_together(world):
  found = {name: resolve(f"embedded:{world}/{name}", name) for name in MODELS}
  sd, schedule = stable_diffusion.load(found["sd"]), stable_diffusion.load_schedule(found["sd"])
  encoder = hub.load(clip.CLIPModel, found["clip"])
  words = [tokenizer.Tokenizer.from_folder(folder) for folder in (found["clip"], found["sd"] / "tokenizer")]
  for text_model, tokens in zip((encoder.text_model, sd.text_encoder), words):
    assert text_model.embeddings.token_embedding.num_embeddings == tokens.vocab_size
    assert text_model.embeddings.position_embedding.num_embeddings == tokens.length
    assert text_model.eos_token_id == tokens.eos_id
  assert schedule.kind is not None
  latents = jax.ShapeDtypeStruct((1, *sd.latent_shape), jnp.float32)
  text = jax.ShapeDtypeStruct((1, words[1].length), jnp.int32)
  output = jax.eval_shape(lambda x, ids: sd.unet(x, jnp.zeros(1), sd.text(ids)), latents, text)
  images = jax.eval_shape(sd.decode, output)
  assert images.shape[1] == images.shape[2] == encoder.vision_model.embeddings.image_size
  heads = jax.eval_shape(hub.load(judge.Judge, found["judge"]), images)
  assert {name: head.shape[1] for name, head in heads.items()} == {
    name: len(labels) for name, labels in hub.read_json(found["judge"] / "config.json")["heads"].items()}


@each_world
def test_files(world):
  files = [path for path in (WORLDS / world).rglob("*") if path.is_file()]
  assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
  weights = [path for path in files if path.suffix == ".safetensors"]
  assert sum(path.stat().st_size for path in weights) <= 8_000_000
  for path in weights:
    assert {str(value.dtype) for value in safetensors.numpy.load_file(path).values()} == {"float16"}, path


@each_world
def test_card(world):
  folder = WORLDS / world
  card = (folder / "README.md").read_text(encoding="utf-8")

  def stated(pattern):
    found = re.search(pattern, card)
    assert found, f"{folder}/README.md says nothing like {pattern!r}"
    return found[1]

  digest = checkpoint.fingerprint({name: checkpoint.fingerprint_folder(folder / name) for name in MADE[world]})
  assert stated(r"sha256 over all files \(first 16 hex digits\)\W*([0-9a-f]{16})\b") == digest
  size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
  assert int(stated(r"([\d,]+) bytes").replace(",", "")) == size
  config = stated(r"python -m digzsl_jax\.main --config=(\S+\.py)")
  assert (pathlib.Path(__file__).parent.parent / config).is_file()
  stated(r"\| data \| (.{20,}) \|")
  stated(r"\| seed \| (\d+) \|")
  stated(r"(?i)\blimits: (.{20,})")
  for part in ("clip", *(("vae", "judge", "sd") if "sd" in MADE[world] else ())):
    assert re.search(r"\b[a-z_]+ -?\d", stated(rf"\n\| {part} \| ([^|]+)\|")), f"no figure for {part}"
