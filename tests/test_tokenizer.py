"""The tokenizer alone: slots, padding, training, damaged folders."""

import json

import numpy as np
import pytest

from digzsl_jax.data import tokenizer

WORDS = "a photo of the striped crimson star cat cats tar art rat papap bird".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  return tokenizer.train_bpe(WORDS, tmp_path_factory.mktemp("tokenizer"), length=10)


def test_rows_are_framed_padded_and_cut(small):
  ids_bl = small(["a cat", "", "bird " * 20])
  cat, bird, a = small.ids("cat")[0], small.ids("bird")[0], small.ids("a")[0]
  bos, eos, pad = small.bos_id, small.eos_id, small.pad_id
  assert ids_bl.dtype == np.int32
  assert ids_bl.tolist() == [
      [bos, a, cat, eos] + [pad] * 6, [bos, eos] + [pad] * 8, [bos] + [bird] * 8 + [eos]]
  assert small([]).shape == (0, 10)


def test_every_word_is_one_token_of_its_own_and_other_text_encodes(small):
  assert all(len(small.ids(word)) == 1 for word in WORDS)
  assert len({small.ids(word)[0] for word in WORDS}) == len(WORDS)
  assert small.ids("CAT Cats") == small.ids("cat") + small.ids("cats")
  assert len(small.ids("zebra")) == 5
  assert len(small.ids("鳥")) == 3  # its bytes
  assert small.vocab_size == max(small.bos_id, small.eos_id) + 1


def test_words_of_few_letters_do_not_disturb_each_other(tmp_path):
  rng = np.random.default_rng(0)
  for trial in range(30):
    words = {"".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(40)}
    trained = tokenizer.train_bpe(words, tmp_path / str(trial))
    assert all(len(trained.ids(word)) == 1 for word in words)


def test_training_depends_on_the_set_of_words_alone(tmp_path):
  tokenizer.train_bpe(WORDS, tmp_path / "a")
  tokenizer.train_bpe(WORDS[::-1] + WORDS, tmp_path / "b")
  names = {path.name for path in (tmp_path / "a").iterdir()}
  assert names == {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json"}
  for name in names:
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("word", ["Cat", "two words", "t-shirt", "", "mp3", "e\u0301t"])
def test_words_that_cannot_be_one_token_are_named(tmp_path, word):
  with pytest.raises(ValueError, match="cannot be one token"):
    tokenizer.train_bpe([*WORDS, word], tmp_path)


def test_slot_takes_one_position(small):
  ids_l, position = small.encode_with_slot("a photo of {token} {name}", "striped star", "a")
  assert position == 4
  assert ids_l.dtype == np.int32
  assert ids_l.tolist() == small(["a photo of a striped star"])[0].tolist()
  ids_l, position = small.encode_with_slot("{token} {name}", "bird", "cat")
  assert (position, ids_l.tolist()) == (1, small(["cat bird"])[0].tolist())


def test_slot_of_several_vectors(small):
  ids_l, position = small.encode_with_slot("a photo of {token} {name}", "striped star", "the", 3)
  assert position == 4
  assert ids_l.tolist() == small(["a photo of the the the striped star"])[0].tolist()
  assert small.encode_with_slot("a photo of {token} {name}", "star", "a", 5)[0].tolist() == small(
      ["a photo of" + " a" * 5])[0].tolist()
  with pytest.raises(ValueError, match="falls at position 9, .* only 10: shorten the template or take fewer vectors"):
    small.encode_with_slot("a photo of {token} {name}", "star", "a", 6)


def test_slot_errors(small):
  with pytest.raises(ValueError, match="'zebra' is 5 tokens"):
    small.encode_with_slot("{token} {name}", "bird", "zebra")
  for template in ("a {name}", "{token} {token} {name}"):
    with pytest.raises(ValueError, match="exactly once"):
      small.encode_with_slot(template, "bird", "a")
  with pytest.raises(ValueError, match="position 10"):
    small.encode_with_slot("{name} {token}", "bird " * 9, "a")


def test_both_layouts_give_the_same_ids(tmp_path):
  tokenizer.train_bpe(WORDS, tmp_path, length=10)
  whole = tokenizer.Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  parts = tokenizer.Tokenizer.from_folder(tmp_path)
  texts = ["a cat's tar, the zebra!", "鳥 <|endoftext|> star"]
  assert whole(texts).tolist() == parts(texts).tolist()


def test_padding_token_and_length_come_from_the_config(tmp_path):
  tokenizer.train_bpe(WORDS, tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"pad_token": {"content": "!"}, "model_max_length": 10**30}))
  read = tokenizer.Tokenizer.from_folder(tmp_path)
  assert (read.pad_id, read.length) == (0, 77)
  assert read(["a cat"])[0, 4:].tolist() == [0] * 73


def test_folder_errors(tmp_path):
  with pytest.raises(ValueError, match="looked for tokenizer.json, or vocab.json and merges.txt"):
    tokenizer.Tokenizer.from_folder(tmp_path)
  tokenizer.train_bpe(WORDS, tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"bos_token": "<s>"}))
  with pytest.raises(ValueError, match="lacks its special token '<s>'"):
    tokenizer.Tokenizer.from_folder(tmp_path)
  path.write_text("{")
  with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
    tokenizer.Tokenizer.from_folder(tmp_path)
  path.write_text(json.dumps(config))
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="tokenizer.json is damaged"):
    tokenizer.Tokenizer.from_folder(tmp_path)
