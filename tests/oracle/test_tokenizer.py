"""The tokenizer against transformers' CLIPTokenizer, on both folder layouts."""

import json

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from digzsl_jax.data import tokenizer

WORDS = "a photo of the striped crimson star cat cats catsup tar bird it 's 't".split()
TEXTS = [
    "", " ", "a photo of the striped crimson star", "A PHOTO\tof\n\nthe   Cat's", "it's they're I'd we'll 'S",
    "cats catsup tar-star star,tar... (bird)", "hello!", "!", "!!", "a ! b", "b!a", "1234 a1b2 3.14 ½ ²",
    "été naïve Ünïcode ß İ ﬁ", "e\u0301 \u00e9 n\u0303", "漢字 かな 한국어", "🐦 bird 👩‍👩‍👧", "<|endoftext|>",
    "cat <|startoftext|> bird<|endoftext|>star", "<|EndOfText|>", "a\u00a0b\u200bc\u3000d", "\x00\x7f\ufffd",
    "the bird " * 40, "supercalifragilistic" * 8, "</w> a</w>", "under_score #tag @me $5 50%"]


@pytest.fixture(params=["!", "<|endoftext|>"])
def folder(request, tmp_path):
  tokenizer.train_bpe(WORDS, tmp_path, length=16)
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(content | {"pad_token": request.param}))
  return tmp_path


def _compare(folder, theirs):
  ours = tokenizer.Tokenizer.from_folder(folder)
  assert ours.vocab_size == len(theirs)
  assert ours.bos_id == theirs.bos_token_id
  assert ours.eos_id == theirs.eos_token_id
  assert ours.pad_id == theirs.pad_token_id
  assert ours.length == theirs.model_max_length == 16
  for text in TEXTS:
    assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, text
    wanted = theirs([text], padding="max_length", truncation=True).input_ids
    assert ours([text]).tolist() == wanted, text


@pytest.mark.parametrize("layout", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_ids_equal_transformers_on_either_layout(folder, layout):
  for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(layout):
    (folder / name).unlink()
  _compare(folder, transformers.CLIPTokenizer.from_pretrained(folder))


def test_folder_that_transformers_saves(folder, tmp_path_factory):
  saved = tmp_path_factory.mktemp("saved")
  theirs = transformers.CLIPTokenizer.from_pretrained(folder)
  theirs(["bird"], padding="max_length", truncation=True)  # leaves padding and truncation switched on
  theirs.save_pretrained(saved)
  _compare(saved, theirs)


def test_special_tokens_written_as_objects(folder):
  path = folder / "special_tokens_map.json"
  special = json.loads(path.read_text())
  path.write_text(json.dumps({name: {"content": token, "lstrip": False, "normalized": True, "rstrip": False,
                                     "single_word": False} for name, token in special.items()}))
  config = json.loads((folder / "tokenizer_config.json").read_text())
  (folder / "tokenizer_config.json").write_text(json.dumps(
      {name: value for name, value in config.items() if name not in special}))
  ours = tokenizer.Tokenizer.from_folder(folder)
  theirs = transformers.CLIPTokenizer.from_pretrained(folder)
  assert ours.pad_id == theirs.pad_token_id
  assert ours(["a cat!"]).tolist() == theirs(["a cat!"], padding="max_length").input_ids
