"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747, MIT licence): real photographs at laptop scale.

Grey 28x28 pictures become 32x32 RGB by a black border and repetition. The captions of the web corpus are
our own design of difficulty: they often take the name of one class for another's that looks alike, so
that a model trained on them mixes these classes up.

The corpus holds official training pictures of *all* classes, unseen ones too, as the training data of
Stable Diffusion holds birds; zero-shot tests use official test pictures only.

Shapes: n image, h w pixel, c colour channel (RGB).
"""

import gzip
import pathlib
import zlib

import numpy as np

from digzsl_jax.data import splits

NAMES = ("tee", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SEEN = (0, 1, 5, 8, 9)  # tee, trouser, sandal, bag, boot
UNSEEN = (2, 3, 4, 6, 7)  # pullover, dress, coat, shirt, sneaker
# The unseen classes are clothes for the upper body and a shoe; so are these two, and like them each
# has a relative among the classes that remain (trouser, sandal, bag).
VALIDATION = (0, 9)  # tee, boot

# One word per class that captions never get wrong.
ADJECTIVES = ("cotton", "legged", "knitted", "sleeveless", "buttoned", "strappy", "collared", "laced",
              "handled", "ankle")
# Words for what the pixels show, whatever the class: (lowest third, highest third) of two measures.
BRIGHTNESS, ASPECT = ("dark", "bright"), ("narrow", "wide")
# Within a group captions take one name for another.
CONFUSABLE = (("pullover", "coat", "shirt"), ("tee", "dress"), ("sneaker", "sandal", "boot"))
WORDS = ("a", "photo", "of", "and", "the", "with", *NAMES, *ADJECTIVES, *BRIGHTNESS, *ASPECT)

FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
_STEMS = {"train": "train", "test": "t10k"}
_FOREGROUND = 16  # grey levels above which a pixel belongs to the article


def load(*, folder: str | None = None, source: str = "files", train_per_class: int = 200,
         test_per_class: int = 200, seed: int = 0) -> splits.Dataset:
  """The zero-shot split: five seen and five unseen classes.

  Args:
    folder: holds the four official idx files, gzipped or not; for TFDS its data directory. None for
      Debian's place, or TFDS's own.
    source: "files" or "tfds".
    train_per_class: official training images drawn for each class, at most 6000.
    test_per_class: official test images drawn for each class, at most 1000.
    seed: of the draw.

  Raises:
    ValueError: missing, truncated or foreign files; unknown source; more images asked for than there are.
  """
  train, test = read("train", folder, source), read("test", folder, source)

  def drawn(part: splits.LabelledImages, classes: tuple[int, ...], per_class: int, stream: int):
    rng = np.random.default_rng((seed, stream))
    rows = []
    for label in classes:
      of_class = np.flatnonzero(part.labels_n == label)
      if not 1 <= per_class <= len(of_class):
        raise ValueError(f"{per_class} images per class asked for, but Fashion-MNIST has {len(of_class)} "
                         f"of {NAMES[label]} in this part; ask for 1 to {len(of_class)}")
      rows.append(rng.permutation(of_class)[:per_class])
    rows = np.concatenate(rows)
    return splits.LabelledImages(to_rgb32(part.images_nhwc[rows]), part.labels_n[rows])

  return splits.Dataset(
    name="fashion_mnist", names=NAMES, seen=SEEN, unseen=UNSEEN, validation=VALIDATION,
    train=drawn(train, SEEN, train_per_class, 0), test_seen=drawn(test, SEEN, test_per_class, 1),
    test_unseen=drawn(test, UNSEEN, test_per_class, 2), real_unseen=drawn(train, UNSEEN, train_per_class, 3))


def web_corpus(folder: str | None, n: int, seed: int, mixup: float = 0.45,
               source: str = "files") -> tuple[np.ndarray, list[str], np.ndarray]:
  """Captioned official training pictures of all ten classes.

  A caption is "a photo of {slot} {name}". The slot is "a" (50 %), a word for what the pixels show (25 %;
  "a" again where none applies) or the class's reliable adjective (25 %).

  Args:
    folder: as in `load`.
    n: number of pictures; every training picture comes once before any comes twice.
    seed: of order and captions.
    mixup: probability that a name of a `CONFUSABLE` group is replaced by another of its group.
    source: as in `load`.

  Returns:
    `(images_nhwc, captions, labels_n)` with true labels.
  """
  if not 0 <= mixup <= 1:
    raise ValueError(f"mixup is {mixup}: it is a probability, 0 to 1")
  train = read("train", folder, source)
  rng = np.random.default_rng((seed, 4))
  rows = rng.permutation(len(train.labels_n))[np.arange(n) % len(train.labels_n)]
  words = [words_n[rows] for words_n in _appearance(train.images_nhwc[..., 0])]
  labels_n = train.labels_n[rows]
  captions = []
  swap_n, other_n, slot_n = rng.random((3, n))
  for label, swap, other, slot, *shown in zip(labels_n, swap_n, other_n, slot_n, *words):
    name = NAMES[label]
    others = [word for group in CONFUSABLE if name in group for word in group if word != name]
    if swap < mixup and others:
      name = others[int(other * len(others))]
    shown = [word for word in shown if word]
    if slot < 0.25:
      word = ADJECTIVES[label]
    elif slot < 0.5 and shown:
      word = shown[int((slot - 0.25) * 4 * len(shown))]
    else:
      word = "a"
    captions.append(f"a photo of {word} {name}")
  return to_rgb32(train.images_nhwc[rows]), captions, labels_n


def read(part: str, folder: str | None = None, source: str = "files") -> splits.LabelledImages:
  """All images of a part ("train" or "test"), grey `[n, 28, 28, 1]` uint8, in the source's order."""
  if source == "tfds":
    return _read_tfds(part, folder)
  if source != "files":
    raise ValueError(f'source is "{source}": choose files or tfds')
  place = pathlib.Path(folder or FOLDER)
  if not place.is_dir():
    raise ValueError(f"Fashion-MNIST not found: no folder {place}. Run `apt install dataset-fashion-mnist`, "
                     "or put the four official files from https://github.com/zalandoresearch/fashion-mnist "
                     "in a folder and name it in the setting `folder`")
  images_nhw = read_idx(_find(place, f"{_STEMS[part]}-images-idx3-ubyte"), 3)
  labels_path = _find(place, f"{_STEMS[part]}-labels-idx1-ubyte")
  labels_n = read_idx(labels_path, 1)
  if images_nhw.shape[1:] != (28, 28) or len(images_nhw) != len(labels_n) or labels_n.max(initial=0) > 9:
    raise ValueError(f"{labels_path} and its images are not Fashion-MNIST's: {len(labels_n)} labels up to "
                     f"{labels_n.max(initial=0)}, images {list(images_nhw.shape)}; fetch the official "
                     "files again")
  return splits.LabelledImages(images_nhw[..., None], labels_n.astype(np.int32))


def read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
  """A uint8 array of `rank` dimensions from an idx file, gzipped if its name ends in .gz.

  Raises:
    ValueError: not an idx file of bytes of that rank, or its length is not what its header says.
  """
  remedy = "fetch the official file again"
  try:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{path} is truncated or no gzip file ({error}); {remedy}") from error
  header = 4 + 4 * rank
  if len(raw) < header or raw[:4] != bytes((0, 0, 8, rank)):
    raise ValueError(f"{path} is no idx file of bytes in {rank} dimensions; {remedy}")
  shape = tuple(np.frombuffer(raw, ">u4", rank, 4).tolist())
  expected = header + int(np.prod(shape))
  if len(raw) != expected:
    raise ValueError(f"{path} holds {len(raw)} bytes where its header announces {expected}; {remedy}")
  return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def to_rgb32(images_nhwc: np.ndarray) -> np.ndarray:
  """Grey `[n, 28, 28, 1]` to RGB `[n, 32, 32, 3]` with a black border of two pixels."""
  return np.repeat(np.pad(images_nhwc, ((0, 0), (2, 2), (2, 2), (0, 0))), 3, axis=-1)


def _find(folder: pathlib.Path, stem: str) -> pathlib.Path:
  for path in (folder / f"{stem}.gz", folder / stem):
    if path.is_file():
      return path
  raise ValueError(f"Fashion-MNIST is incomplete: {folder} holds neither {stem}.gz nor {stem}; run "
                   "`apt install dataset-fashion-mnist` or fetch the official file")


def _read_tfds(part: str, folder: str | None) -> splits.LabelledImages:
  try:
    import tensorflow_datasets as tfds  # an optional extra, slow to import
  except ImportError as error:
    raise ValueError("source=tfds needs tensorflow_datasets: `pip install tensorflow-datasets`, or set "
                     "source=files") from error
  try:
    rows = list(tfds.data_source("fashion_mnist", split=part, data_dir=folder or None))
  except Exception as error:  # whatever TFDS raises for data that is not prepared, or fails to download
    raise ValueError(f"TFDS could not provide fashion_mnist ({part}) from "
                     f"{folder or 'its default data_dir'}: {error}. Prepare it on a machine with TensorFlow "
                     "and network, or set source=files") from error
  return splits.LabelledImages(np.stack([row["image"] for row in rows]).astype(np.uint8),
                               np.array([row["label"] for row in rows], np.int32))


def _appearance(images_nhw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """For each image a brightness word and an aspect word, "" in the middle third of all images given."""
  inside_nhw = images_nhw > _FOREGROUND
  area_n = np.maximum(inside_nhw.sum(axis=(1, 2)), 1)
  brightness_n = (images_nhw * inside_nhw).sum(axis=(1, 2)) / area_n
  height_n, width_n = (_extent(inside_nhw.any(axis=axis)) for axis in (2, 1))
  words = []
  for measure_n, (low, high) in ((brightness_n, BRIGHTNESS), (width_n / np.maximum(height_n, 1), ASPECT)):
    thirds = np.quantile(measure_n, (1 / 3, 2 / 3))
    words.append(np.where(measure_n < thirds[0], low, np.where(measure_n > thirds[1], high, "")))
  return tuple(words)


def _extent(filled_nl: np.ndarray) -> np.ndarray:
  """From the first to the last True, inclusive."""
  last_n = filled_nl.shape[1] - np.argmax(filled_nl[:, ::-1], axis=1)
  return np.where(filled_nl.any(axis=1), last_n - np.argmax(filled_nl, axis=1), 0)
