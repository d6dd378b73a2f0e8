"""Fashion-MNIST on a small forged copy of the official files; the real ones where they are installed."""

import gzip
import pathlib
import struct
import sys
import types

import numpy as np
import pytest

from digzsl_jax.data import datasets, fashion_mnist, splits


def _write_idx(path: pathlib.Path, array: np.ndarray) -> None:
  raw = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
  path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for stem, per_class in (("train", 30), ("t10k", 8)):
    labels = rng.permutation(np.repeat(np.arange(10), per_class)).astype(np.uint8)
    images = np.zeros((len(labels), 28, 28), np.uint8)
    for image in images:
      height, width = rng.integers(4, 26, size=2)
      image[1:1 + height, 2:2 + width] = rng.integers(40, 255)
    images[:, 0, 0] = labels + 1  # below what counts as foreground
    _write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
    _write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", labels)
  return tmp_path


def test_lists_name_what_they_say():
  named = [[fashion_mnist.NAMES[k] for k in classes]
           for classes in (fashion_mnist.SEEN, fashion_mnist.UNSEEN, fashion_mnist.VALIDATION)]
  assert named == [["tee", "trouser", "sandal", "bag", "boot"],
                   ["pullover", "dress", "coat", "shirt", "sneaker"], ["tee", "boot"]]


def test_load_takes_training_and_test_images_from_their_own_files(folder):
  data = fashion_mnist.load(folder=str(folder), train_per_class=5, test_per_class=4, seed=1)
  test_bytes = {image.tobytes() for image in fashion_mnist.read("test", folder).images_nhwc}
  for part, classes, per_class, from_test in (
      (data.train, data.seen, 5, False), (data.test_seen, data.seen, 4, True),
      (data.test_unseen, data.unseen, 4, True), (data.real_unseen, data.unseen, 5, False)):
    assert part.images_nhwc.shape == (5 * per_class, 32, 32, 3) and part.images_nhwc.dtype == np.uint8
    np.testing.assert_array_equal(part.labels_n, np.repeat(classes, per_class))
    # The corner pixel carries the label: images and labels stayed together, and the border is 2 wide.
    np.testing.assert_array_equal(part.images_nhwc[:, 2, 2], np.repeat(part.labels_n[:, None] + 1, 3, axis=1))
    assert not part.images_nhwc[:, :2].any() and not part.images_nhwc[:, :, -2:].any()
    for image in part.images_nhwc:
      assert (image[2:30, 2:30, :1].tobytes() in test_bytes) == from_test
  again = datasets.load({"name": "fashion_mnist", "folder": str(folder), "train_per_class": 5,
                         "test_per_class": 4, "seed": 1})
  assert splits.fingerprint(again) == splits.fingerprint(data)


def test_more_images_than_there_are(folder):
  with pytest.raises(ValueError, match="9 images per class .* has 8 of tee"):
    fashion_mnist.load(folder=folder, train_per_class=5, test_per_class=9)


def test_captions_swap_within_groups_only(folder):
  n, mixup = 3000, 0.4
  images, captions, labels = fashion_mnist.web_corpus(folder, n, seed=0, mixup=mixup)
  assert images.shape == (n, 32, 32, 3) and labels.shape == (n,)
  swapped = {name: [] for name in fashion_mnist.NAMES}
  for image, caption, label in zip(images, captions, labels):
    assert set(caption.split()) <= set(fashion_mnist.WORDS)
    start, slot, said = caption.rsplit(" ", 2)
    assert start == "a photo of" and image[2, 2, 0] == label + 1
    name = fashion_mnist.NAMES[label]
    swapped[name].append(said != name)
    assert said == name or any({said, name} <= set(group) for group in fashion_mnist.CONFUSABLE)
    if slot in fashion_mnist.ADJECTIVES:
      assert slot == fashion_mnist.ADJECTIVES[label]
  for name, wrong in swapped.items():
    expected = mixup if any(name in group for group in fashion_mnist.CONFUSABLE) else 0
    assert abs(np.mean(wrong) - expected) < 0.1
  # Every training picture comes once before any comes twice.
  first = {image.tobytes() for image in images[:300]}
  assert first == {image.tobytes() for image in images[300:600]}


def test_appearance_words_are_true(folder):
  grey = fashion_mnist.read("train", folder).images_nhwc[..., 0].astype(float)
  images, captions, _ = fashion_mnist.web_corpus(folder, 300, seed=0)

  def measures(image):
    inside = image > 16
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return image[inside].mean(), (np.ptp(columns) + 1) / (np.ptp(rows) + 1)

  thirds = np.quantile([measures(image) for image in grey], (1 / 3, 2 / 3), axis=0)
  words = {"dark": (0, -1), "bright": (0, 1), "narrow": (1, -1), "wide": (1, 1)}
  found = set()
  for image, caption in zip(images, captions):
    slot = caption.split()[3]
    if slot in words:
      measure, sign = words[slot]
      value = measures(image[..., 0].astype(float))[measure]
      assert value < thirds[0, measure] if sign < 0 else value > thirds[1, measure]
      found.add(slot)
  assert found == set(words)


def test_missing_folder_and_file(folder, tmp_path):
  with pytest.raises(ValueError, match=r"no folder .*nowhere.*apt install dataset-fashion-mnist"):
    fashion_mnist.load(folder=tmp_path / "nowhere")
  (folder / "t10k-labels-idx1-ubyte").unlink()
  with pytest.raises(ValueError, match="neither t10k-labels-idx1-ubyte.gz nor t10k-labels-idx1-ubyte"):
    fashion_mnist.load(folder=folder, train_per_class=5, test_per_class=5)


@pytest.mark.parametrize("damage, message", [
  (lambda raw: raw[:-500], "truncated"),
  (lambda raw: b"not gzip at all", "no gzip"),
  (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "header announces"),
  (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "header announces"),
  (lambda raw: gzip.compress(b"\0\0\x0d\3" + gzip.decompress(raw)[4:]), "no idx file"),
  (lambda raw: gzip.compress(b""), "no idx file"),
])
def test_damaged_file_is_named(folder, damage, message):
  path = folder / "train-images-idx3-ubyte.gz"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
    fashion_mnist.read("train", folder)


def test_labels_and_images_must_agree(folder):
  _write_idx(folder / "train-labels-idx1-ubyte", np.zeros(7, np.uint8))
  with pytest.raises(ValueError, match="train-labels.*7 labels"):
    fashion_mnist.read("train", folder)


def test_tfds_is_read_through_data_source(folder, monkeypatch):
  calls = []

  def data_source(name, split, data_dir):
    calls.append((name, split, data_dir))
    part = fashion_mnist.read(split, folder)
    return [{"image": image, "label": int(label)} for image, label in zip(*part)]

  monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(data_source=data_source))
  got = fashion_mnist.load(source="tfds", train_per_class=3, test_per_class=3)
  assert calls == [("fashion_mnist", "train", None), ("fashion_mnist", "test", None)]
  expected = fashion_mnist.load(folder=folder, train_per_class=3, test_per_class=3)
  assert splits.fingerprint(got) == splits.fingerprint(expected)


def test_tfds_errors_name_the_way_out(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it raises ImportError
  with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
    fashion_mnist.read("train", source="tfds")

  def unprepared(*_, **__):
    raise AssertionError("not prepared")

  monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(data_source=unprepared))
  with pytest.raises(ValueError, match="not prepared.*source=files"):
    fashion_mnist.read("train", source="tfds")
  with pytest.raises(ValueError, match="choose files or tfds"):
    fashion_mnist.read("train", source="web")


@pytest.mark.skipif(not pathlib.Path(fashion_mnist.FOLDER).is_dir(), reason="no dataset-fashion-mnist")
def test_official_files():
  train, test = (fashion_mnist.read(part) for part in ("train", "test"))
  np.testing.assert_array_equal(np.bincount(train.labels_n), np.full(10, 6000))
  np.testing.assert_array_equal(np.bincount(test.labels_n), np.full(10, 1000))
  np.testing.assert_array_equal(train.labels_n[:5], [9, 0, 0, 3, 0])
