"""Labels in CLIP's space: what padding does, the mean of prompts, what is kept, and what is refused."""

import numpy as np
import pytest
import tqdm

from digzsl_jax import label_texts, losses
from digzsl_jax.data import tokenizer
from digzsl_jax.models import clip
from tests.conftest import random_model

WORDS = ("a", "photo", "of", "the", "dog", "cat", "bicycle", "big", "small")
TEMPLATES = ("a photo of a {name}", "the {name}")
NAMES = ("dog", "big cat", "small_bicycle")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return tokenizer.train_bpe(WORDS, tmp_path_factory.mktemp("words"), length=77)


@pytest.fixture(scope="module")
def model(words):
  tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
  return random_model(clip.CLIPModel, {
      "projection_dim": 8, "vision_config": tower | {"image_size": 8, "patch_size": 4}, "text_config": tower | {
          "vocab_size": words.vocab_size, "eos_token_id": words.eos_id, "max_position_embeddings": 77}}, seed=0)


def bar(count):
  return tqdm.tqdm(total=count, disable=True)


def test_padding_that_is_left_out_changes_nothing(model, words):
  texts = ["a photo of a dog", "the big, big, big cat and the small small small small bicycle", ""]
  found = label_texts.encode(model, words, texts, bar)
  whole = losses.normalise(model.encode_text(words(texts))[0])
  np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6)
  long = ["big " * 200, "big " * 75]  # cut alike
  np.testing.assert_array_equal(*label_texts.encode(model, words, long, bar))


def test_a_label_is_the_mean_of_its_prompts_and_is_kept(model, words, tmp_path, monkeypatch):
  arguments = dict(key="weights", cache=tmp_path, progress=bar)
  found = label_texts.of_labels(model, words, NAMES, TEMPLATES, **arguments)
  texts = [[template.format(name=name.replace("_", " ")) for template in TEMPLATES] for name in NAMES]
  each = [label_texts.encode(model, words, of_name, bar) for of_name in texts]
  mean = np.stack(each).mean(1)
  np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=0, atol=1e-6)
  monkeypatch.setattr(label_texts, "encode", None)
  np.testing.assert_array_equal(label_texts.of_labels(model, words, NAMES, TEMPLATES, **arguments), found)
  for change in (dict(key="others"), dict(cache=None)):
    with pytest.raises(TypeError):
      label_texts.of_labels(model, words, NAMES, TEMPLATES, **arguments | change)
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("names, message", [
    ([], "list of labels is empty"), (["dog", " "], "is empty"), (["dog", "big cat", "Big  cat"],
                                                                       "'Big  cat', 'big cat'"),
    (["dog", "big " * 80], "label 'big big .*' is too long: .* has 8[0-9] tokens, and this CLIP reads 75")])
def test_labels_that_cannot_be_told_or_read_are_refused(words, names, message):
  with pytest.raises(ValueError, match=message):
    label_texts.check(names, TEMPLATES, words)
