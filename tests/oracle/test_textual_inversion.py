"""Learnt tokens to and from diffusers' `load_textual_inversion`: the same ids and the same text states."""

import functools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import jax
import safetensors.torch
from flax import nnx

from digzsl_jax.base_workspace import WORLDS
from digzsl_jax.data import textual_inversion, tokenizer
from digzsl_jax.models import clip, hub, stable_diffusion

WORDS = "a photo of the in style painting star cat".split()
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY = {"sd1": ("quick_gelu", "<|endoftext|>"), "sd2": ("gelu", "!")}  # what the text towers and tokenizers differ in
COUNTS = {"<bird>": 1, "<old-paint>": 3, "sks": 2, "sksx": 1, "<Owl>": 2, "two words": 1}

each_world = pytest.mark.parametrize("world", [*TINY, "scenes"])


def make_folder(folder, act, pad):
  """A diffusers folder with text tower and tokenizer alone."""
  words = tokenizer.train_bpe(WORDS, folder / "tokenizer")
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    path = folder / "tokenizer" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
  torch.manual_seed(0)
  tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(
      **TEXT, vocab_size=words.vocab_size, hidden_act=act, bos_token_id=words.bos_id, eos_token_id=words.eos_id))
  with torch.no_grad():
    for parameter in tower.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  tower.save_pretrained(folder / "text_encoder")
  return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  base = tmp_path_factory.mktemp("folders")
  return {name: make_folder(base / name, *how) for name, how in TINY.items()} | {"scenes": WORLDS / "scenes" / "sd"}


@pytest.fixture
def pipe(folders, world):
  """The reference's pipeline; `load_textual_inversion` changes it, so each test gets its own."""
  folder, parts = folders[world], ("vae", "unet", "scheduler", "safety_checker", "feature_extractor")
  tower = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
  words = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
  return diffusers.StableDiffusionPipeline(text_encoder=tower, tokenizer=words, **dict.fromkeys(parts))


@functools.cache
def opened(folder):
  """Our `(text(ids_bl, vectors_nd), tokenizer, width)`."""
  tower = hub.load(clip.CLIPTextModel, folder / "text_encoder")
  graphdef, params = nnx.split(stable_diffusion.StableDiffusion(tower, None, None))
  text = jax.jit(lambda params, ids_bl, vectors_nd: nnx.merge(graphdef, params).text(ids_bl, vectors_nd))
  words = tokenizer.Tokenizer.from_folder(folder / "tokenizer")
  return functools.partial(text, params), words, tower.embeddings.token_embedding.features


def prompts(length):
  """Texts with learnt tokens in them; the last ones are cut, within a token, right before or right behind it."""
  room = length - 2
  return ["a photo of a cat", "a photo of <bird>", "a photo of <bird> in the style of <old-paint>", "<bird>",
          "two  words, <bird>", "<bird><bird> <BIRD>", "<old-paint>,<bird>s! <OLD-PAINT> star", "sks", "asksx sksxx",
          "SKS <Owl> a<owl>",
          "cat " * (room - 1) + "<bird>", "cat " * room + "<bird>", "cat " * (room - 2) + "<old-paint> cat"]


def draw(width, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {token: rng.normal(size=(count, width)).astype(dtype) for token, count in COUNTS.items()}


def compare(pipe, folder, tokens):
  """The pipeline, which knows `tokens`, and ours with them: ids and text states of every prompt."""
  text, words, _ = opened(folder)
  texts = prompts(words.length)
  words, vectors_nd = textual_inversion.extend(words, tokens)
  ids_bl = words(texts)
  read = pipe.tokenizer(pipe.maybe_convert_prompt(texts, pipe.tokenizer), padding="max_length", truncation=True)
  assert ids_bl.tolist() == read.input_ids
  with torch.no_grad():
    want_bld = pipe.encode_prompt(texts, "cpu", 1, False)[0].numpy()
  got_bld = np.asarray(text(ids_bl, vectors_nd))
  print(f"text states {np.abs(got_bld - want_bld).max():.1e} of {np.abs(want_bld).max():.1f}")
  assert np.abs(want_bld[0] - want_bld[1]).max() > 0.1
  np.testing.assert_allclose(got_bld, want_bld, rtol=0, atol=1e-5)


@each_world
def test_our_files_in_diffusers(pipe, folders, world, tmp_path):
  tokens = draw(opened(folders[world])[2])
  for n, (token, vectors_nd) in enumerate(tokens.items()):
    textual_inversion.write(tmp_path / f"{n}.safetensors", token, vectors_nd)
    pipe.load_textual_inversion(str(tmp_path / f"{n}.safetensors"))
  compare(pipe, folders[world], tokens)


@each_world
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_files_here(pipe, folders, world, dtype, tmp_path):
  tokens = {}
  for n, (token, vectors_nd) in enumerate(draw(opened(folders[world])[2]).items()):
    file = tmp_path / f"{n}.safetensors"  # as the training script saves them: [n, d], of one vector too
    safetensors.torch.save_file({token: torch.from_numpy(vectors_nd).to(dtype)}, file, metadata={"format": "pt"})
    pipe.load_textual_inversion(str(file))
    tokens |= textual_inversion.read(file, vectors_nd.shape[1])
  compare(pipe, folders[world], tokens)


@pytest.mark.parametrize("world", ["sd1"])
def test_files_of_automatic1111(pipe, folders, world, tmp_path):
  tokens = {}
  for token, vectors_nd in draw(opened(folders[world])[2]).items():
    file = tmp_path / f"{token}.safetensors"
    safetensors.torch.save_file({"emb_params": torch.from_numpy(vectors_nd)}, file)
    pipe.load_textual_inversion(str(file), token=token)
    tokens |= textual_inversion.read(file)
  assert list(tokens) == list(COUNTS)
  compare(pipe, folders[world], tokens)


@pytest.mark.parametrize("world", ["sd1"])
@pytest.mark.parametrize("before, token", [({}, "cat</w>"), ({"<a>": 2}, "<a>"), ({"<a>": 2}, "<a>_1"),
                                           ({"<a>_1": 1}, "<a>")])
def test_both_refuse_a_name_that_is_taken(pipe, folders, world, before, token):
  _, words, width = opened(folders[world])
  for name, count in before.items():
    pipe.load_textual_inversion({name: torch.ones(count, width)})
    words = words.with_tokens({name: count})
  with pytest.raises(ValueError, match="already in tokenizer vocabulary"):
    pipe.load_textual_inversion({token: torch.ones(1, width)})
  with pytest.raises(ValueError, match="learnt token '.*': the name '.*' is taken"):
    words.with_tokens({token: 1})
