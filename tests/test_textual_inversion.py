"""Files of learnt tokens, prompts with such tokens in them, and what the text tower makes of both."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from digzsl_jax.base_workspace import WORLDS
from digzsl_jax.data import textual_inversion, tokenizer
from digzsl_jax.models import clip, hub, stable_diffusion

WORDS = "a photo of the in style star cat".split()
BIRD_ND, PAINT_ND = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
TOKENS = {"<bird>": BIRD_ND[:1], "<old-paint>": PAINT_ND}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return tokenizer.train_bpe(WORDS, tmp_path_factory.mktemp("tokenizer"), length=10)


def save(path, **tensors):
  safetensors.numpy.save_file(tensors, path)
  return path


@pytest.mark.parametrize("vectors, stored", [(BIRD_ND, (3, 8)), (BIRD_ND[:1], (8,)), (BIRD_ND[0], (8,)),
                                             (BIRD_ND[::2], (2, 8)), (BIRD_ND.T, (8, 3))])
def test_what_is_written_is_read(vectors, stored, tmp_path):
  file = tmp_path / "folder" / "bird.safetensors"
  textual_inversion.write(file, "<bird>", vectors)
  [(token, tensor)] = safetensors.numpy.load_file(file).items()
  assert (token, tensor.shape) == ("<bird>", stored)
  [(token, read)] = textual_inversion.read(file, np.shape(vectors)[-1]).items()
  assert token == "<bird>" and read.dtype == np.float32
  np.testing.assert_array_equal(read, np.atleast_2d(vectors))


def test_layouts(tmp_path):
  several = textual_inversion.read(save(tmp_path / "a.safetensors", star=BIRD_ND[0], cat=BIRD_ND[1]))
  assert set(several) == {"star", "cat"}
  np.testing.assert_array_equal(several["cat"], BIRD_ND[1:2])
  [(token, read)] = textual_inversion.read(save(tmp_path / "old-paint.safetensors", emb_params=PAINT_ND)).items()
  assert token == "old-paint"
  np.testing.assert_array_equal(read, PAINT_ND)
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
    half = PAINT_ND.astype(dtype)
    read = textual_inversion.read(save(tmp_path / "b.safetensors", x=half))["x"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, half.astype(np.float32))


@pytest.mark.parametrize("tensors, width, message", [
    (dict(clip_l=np.ones((2, 768)), clip_g=np.ones((2, 1280))), 768, r"\['clip_g', 'clip_l'\].* Stable Diffusion XL"),
    (dict(bird=np.ones((2, 768))), 1024, r"token 'bird' is 768 wide \(Stable Diffusion 1.x\), but the text tower 1024 "
                                         r"\(Stable Diffusion 2.x\)"),
    (dict(bird=np.ones(1024)), 768, r"1024 wide \(Stable Diffusion 2.x\), but the text tower 768 \(Stable Diffusion 1"),
    (dict(bird=np.ones(8)), 64, "token 'bird' is 8 wide, but the text tower 64; take"),
    (dict(cat=np.ones(8), bird=np.array([1, np.nan] * 4)), 8, "token 'bird' has values that are not finite"),
    (dict(bird=np.array([1, 1e39])), 2, "token 'bird' has values that are not finite"),
    (dict(bird=np.ones((2, 2, 8))), 8, r"token 'bird' is float64 of shape \(2, 2, 8\); vectors are"),
    (dict(bird=np.ones((0, 8))), 8, r"of shape \(0, 8\)"),
    (dict(bird=np.ones(8, np.int32)), 8, "is int32 of"),
    ({}, 8, "holds no token"),
])
def test_files_that_cannot_be_used(tensors, width, message, tmp_path):
  with pytest.raises(ValueError, match=f"bird.safetensors.*{message}"):
    textual_inversion.read(save(tmp_path / "bird.safetensors", **tensors), width)


def test_files_that_cannot_be_read(tmp_path):
  for name in ("bird.pt", "bird.bin"):
    with pytest.raises(ValueError, match=f"{name} is a pickle.* -m digzsl_jax.convert .*{name} bird.safetensors"):
      textual_inversion.read(tmp_path / name)
  with pytest.raises(ValueError, match="bird.safetensors is missing"):
    textual_inversion.read(tmp_path / "bird.safetensors")
  file = save(tmp_path / "bird.safetensors", bird=BIRD_ND)
  whole = file.read_bytes()
  header = json.dumps({"bird": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}).encode()
  for damaged in (whole[:-4], b"", b"version https://git-lfs", struct.pack("<Q", len(header)) + header + b"1234"):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="bird.safetensors is missing, truncated or no safetensors file"):
      textual_inversion.read(file)


def test_nothing_unusable_is_written(tmp_path):
  for vectors in (np.full(8, np.inf), np.ones((1, 1, 8)), 3.0):
    with pytest.raises(ValueError, match="bird.safetensors: token '<bird>'"):
      textual_inversion.write(tmp_path / "bird.safetensors", "<bird>", vectors)
  assert not list(tmp_path.iterdir())


def test_prompts(words):
  extended, vectors_nd = textual_inversion.extend(words, TOKENS)
  np.testing.assert_array_equal(vectors_nd, np.concatenate([BIRD_ND[:1], PAINT_ND]))
  bird, *paint = range(words.vocab_size, words.vocab_size + 4)
  a, photo, of, cat, star = (words.ids(word)[0] for word in "a photo of cat star".split())
  assert extended.vocab_size == words.vocab_size + 4
  for text, ids in [("a photo of <bird>", [a, photo, of, bird]), ("a<old-paint>star", [a, *paint, star]),
                    ("<bird> of\n<old-paint>,<BIRD>", [bird, of, *paint, *words.ids(","), bird]),
                    ("<OLD-PAINT>", paint[:1]), ("<old-paint>_2 cat", [paint[2], cat])]:
    assert extended.ids(text) == ids, text
  assert extended.ids("a cat's photo 鳥") == words.ids("a cat's photo 鳥")
  assert words.ids("<bird>") == words.ids("< bird >") and max(words.ids("<bird>")) < words.vocab_size
  assert extended(["cat " * 6 + "<old-paint>"]).tolist() == [[words.bos_id, *[cat] * 6, *paint[:2], words.eos_id]]
  more = extended.with_tokens({"<birds>": 1})  # the longest match wins, whichever was added first
  assert more.ids("<bird> <birds>") == [bird, words.vocab_size + 4]


@pytest.mark.parametrize("tokens, message", [
    ({"cat</w>": 1}, "learnt token 'cat</w>': the name 'cat</w>' is taken; rename the token"),
    ({"": 1}, "learnt token '': the name '' is taken"), ({"<a>": 2, "<a>_1": 1}, "'<a>': the name '<a>_1' is taken"),
    ({"<a>_2": 1, "<a>": 2}, "'<a>': the name '<a>_2' is taken"), ({"<bird>": 1}, "the name '<bird>' is taken")])
def test_names_that_are_taken(tokens, message, words):
  with pytest.raises(ValueError, match=message):
    words.with_tokens({"<bird>": 1}).with_tokens(tokens)


def test_text_tower():
  tower = hub.load(clip.CLIPTextModel, WORLDS / "scenes" / "sd" / "text_encoder")
  graphdef, params = nnx.split(stable_diffusion.StableDiffusion(tower, None, None))
  table_rd = np.asarray(tower.embeddings.token_embedding.embedding[...])
  text = jax.jit(lambda params, *arguments: nnx.merge(graphdef, params).text(*arguments))
  own = len(table_rd)
  ids_bl = np.array([[4, own, 1, 5, 5], [4, 2, own + 1, own, 5], [4, own + 2, own + 2, 3, 5]])
  vectors_bnd = np.random.default_rng(0).normal(size=(3, 3, table_rd.shape[1])).astype(np.float32)

  @jax.jit
  def encode(params, embeds_bld):
    return nnx.merge(graphdef, params).text_encoder(jnp.zeros((3, 5), int), embeds_bld)[0]

  def wanted(vectors_bnd):  # every row by a table of its own
    embeds = [np.concatenate([table_rd, vectors_nd])[ids_l] for ids_l, vectors_nd in zip(ids_bl, vectors_bnd)]
    return encode(params, np.stack(embeds))
  np.testing.assert_allclose(text(params, ids_bl, vectors_bnd), wanted(vectors_bnd), rtol=0, atol=1e-6)
  same_bnd = np.tile(vectors_bnd[:1], (3, 1, 1))
  np.testing.assert_allclose(text(params, ids_bl, vectors_bnd[0]), wanted(same_bnd), rtol=0, atol=1e-6)
  plain_bl = np.minimum(ids_bl, own - 1)
  np.testing.assert_array_equal(text(params, plain_bl, vectors_bnd), text(params, plain_bl))
  for missing in (text(params, ids_bl), text(params, ids_bl, vectors_bnd[:, :2])[2:]):
    assert np.isnan(missing).any((1, 2)).all()  # a learnt id without its vector is not passed over
