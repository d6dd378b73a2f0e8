"""The four zero-shot benchmarks AWA2, CUB, FLO and SUN without their pictures: classes, lists, rows, counts.

Shapes: n image, k class, a attribute.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable

import numpy as np

# Classes and images of each list of the Proposed Splits (Xian et al. 2018, arXiv 1707.00600; FLO: Xian et al. 2018,
# arXiv 1712.00981), counted in the `att_splits.mat` that published code passes on.
PUBLISHED = {
  "AWA2": {"seen": 40, "unseen": 10, "validation": 13,
           "trainval": 23527, "test_seen": 5882, "test_unseen": 7913, "images": 37322},
  "CUB": {"seen": 150, "unseen": 50, "validation": 50,
          "trainval": 7057, "test_seen": 1764, "test_unseen": 2967, "images": 11788},
  "FLO": {"seen": 82, "unseen": 20, "validation": 20,
          "trainval": 5631, "test_seen": 1403, "test_unseen": 1155, "images": 8189},
  "SUN": {"seen": 645, "unseen": 72, "validation": 65,
          "trainval": 10320, "test_seen": 2580, "test_unseen": 1440, "images": 14340},
}
# `rows_digest` of the same files: rows may be wrong though their numbers are right.
PUBLISHED_ROWS = {
  "AWA2": "3b1dff7b8394590354760cfb8ebe8aa22e99b1ddfb12f68b84851b8b2fa05228",
  "CUB": "3918c8c82f4849eab7bb84a4e4ba1dbd368d0b221e82319b87a73e60e03f62ec",
  "FLO": "9e7b1cb6d608b3daacf3e2184a8b557ba0d91cdcf0d584f80a3dfa4b200f6079",
  "SUN": "48aca914a1f045743002b548d97334508841a8a0096f4612b49c1000d2ab0d59",
}
LOCS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")

# Said after the noun in SUN's names, before it in English. "Interior" and "exterior" are nouns and stay behind.
_ADJECTIVES = {"artificial", "broadleaf", "cultivated", "dry", "freestanding", "indoor", "natural", "needleleaf",
               "outdoor", "public", "snowy", "urban", "western", "wild"}
_SPELLING = {"archaelogical": "archaeological", "artic": "arctic", "kindergarden": "kindergarten",
             "procenium": "proscenium"}


@dataclasses.dataclass(frozen=True)
class Split:
  """A benchmark's classes and the rows of its images. Names of rows as in `att_splits.mat`, but counted from 0.

  Attributes:
    name: a key of `PUBLISHED`.
    raw_names_k: class names as the data set writes them; a label is a position here.
    seen: labels with training images.
    unseen: labels known by name alone; with `seen` every label once.
    validation: the seen labels that play unseen while settings are chosen.
    trainval_loc: ascending rows of the training images, all of seen classes.
    test_seen_loc: of held-out images of seen classes.
    test_unseen_loc: of images of unseen classes.
    labels_n: int32, or None where the files do not say which image is of which class.
    paths_n: image files, relative to the folder that was read; or None likewise.
    train_loc: rows for training while settings are chosen, or None. Cut down to `trainval_loc`, as the published
      ones hold all of `test_seen_loc` too.
    val_loc: rows for choosing settings, likewise.
    attributes_ka: unit length for each class, or None.
    seed: of our own division of the seen images; None where the rows are the published ones.

  Raises:
    ValueError: classes in two lists or none, rows in two lists, rows that are no image's, images of classes
      outside their list, or a list that lacks all images of a class.
  """
  name: str
  raw_names_k: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  validation: tuple[int, ...]
  trainval_loc: np.ndarray
  test_seen_loc: np.ndarray
  test_unseen_loc: np.ndarray
  labels_n: np.ndarray | None = None
  paths_n: tuple[str, ...] | None = None
  train_loc: np.ndarray | None = None
  val_loc: np.ndarray | None = None
  attributes_ka: np.ndarray | None = None
  seed: int | None = None

  def __post_init__(self):
    self._check_classes()
    self._check_rows()
    if self.labels_n is not None:
      self._check_labels()

  @functools.cached_property
  def names_k(self) -> tuple[str, ...]:
    """Class names for prompts."""
    return tuple(clean(raw) for raw in self.raw_names_k)

  def _check_classes(self):
    labels = (*self.seen, *self.unseen)
    everything = set(range(len(self.raw_names_k)))
    if not set(labels) <= everything or len(set(self.names_k)) < len(everything):
      raise ValueError(f"{self.name}: labels must be positions among class names that differ")
    for wrong, what in ((set(self.seen) & set(self.unseen), "are both seen and unseen"),
                        ({label for label in labels if labels.count(label) > 1}, "come twice in a list"),
                        (everything - set(labels), "are neither seen nor unseen"),
                        (set(self.validation) - set(self.seen), "are for validation, but not seen")):
      if wrong:
        raise ValueError(f"{self.name}: {some(self.raw_names_k[k] for k in sorted(wrong))} {what}; "
                         "get the class lists again")

  def _check_rows(self):
    rows = {field: getattr(self, field) for field in LOCS}
    for field, other in ((a, b) for a in LOCS for b in LOCS if a < b):
      both = np.intersect1d(rows[field], rows[other])
      if len(both):
        raise ValueError(f"{self.name}: {field} and {other} share {len(both)} images, the first is row {both[0]}; "
                         "training and test images must differ, get att_splits.mat again")
    outside = [loc for loc in (self.train_loc, self.val_loc)
               if loc is not None and not np.isin(loc, self.trainval_loc).all()]
    if outside:
      raise ValueError(f"{self.name}: train_loc and val_loc must lie inside trainval_loc")

  def _check_labels(self):
    n = len(self.labels_n)
    for field, classes in zip(LOCS, (self.seen, self.seen, self.unseen)):
      rows = getattr(self, field)
      if rows.max(initial=0) >= n:
        raise ValueError(f"{self.name}: {field} counts {rows.max() + 1} images, but there are {n}; the rows and "
                         "the list of images are not of the same release")
      found = set(self.labels_n[rows].tolist())
      for wrong, what in ((found - set(classes), "holds images of"), (set(classes) - found, "has no image of")):
        if wrong:
          raise ValueError(f"{self.name}: {field} {what} {some(self.raw_names_k[k] for k in sorted(wrong))}: the rows "
                           "are shifted, or of another order of images than the labels")


@functools.cache
def published_classes(name: str) -> dict[str, str]:
  """"train", "validation" or "unseen" for each class by its raw name, in the order of the Proposed Splits.

  Seen are the first two together; validation is the first of the three published divisions of the seen classes.
  """
  path = pathlib.Path(__file__).parent / "class_names" / f"{name.lower()}.txt"
  lines = path.read_text(encoding="utf-8").splitlines()
  return {raw: part for raw, _, part in (line.split("\t") for line in lines if not line.startswith("#"))}


def clean(raw: str) -> str:
  """A class name as one writes it in a prompt.

  Numbers before names go, `_` and `+` become spaces, a word that repeats the one before it goes, an adjective at
  the end (SUN's "athletic_field_outdoor") moves to the front, and four misspelt words are put right. Lower case,
  as CLIP's tokenizer makes it anyway. Hyphens stay where a data set writes them and come in nowhere else (CUB's
  "Black_footed_Albatross"), so that prompts have the words of published code.
  """
  words = re.sub(r"^\d+\.", "", raw).replace("_", " ").replace("+", " ").replace("?", " ").lower().split()
  words = [_SPELLING.get(word, word) for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
  if len(words) > 1 and words[-1] in _ADJECTIVES:
    words = [words[-1], *words[:-1]]
  return " ".join(words)


def counts(split: Split) -> dict[str, int]:
  """The numbers of `PUBLISHED`."""
  rows = {field.removesuffix("_loc"): len(getattr(split, field)) for field in LOCS}
  images = sum(rows.values()) if split.labels_n is None else len(split.labels_n)
  return {"seen": len(split.seen), "unseen": len(split.unseen), "validation": len(split.validation), **rows,
          "images": images}


def summary(split: Split) -> str:
  """One line of counts, for logs."""
  found = counts(split)
  rows = "rows of att_splits.mat" if split.seed is None else f"seen images divided 80/20 a class by seed {split.seed}"
  return (f"{split.name}: {found['seen']} seen classes ({found['validation']} of them for validation), "
          f"{found['unseen']} unseen; trainval {found['trainval']}, test_seen {found['test_seen']}, test_unseen "
          f"{found['test_unseen']} of {found['images']} images; {rows}")


def rows_digest(split: Split) -> str:
  """SHA-256 (hex) of the rows of the three lists."""
  digest = hashlib.sha256()
  for field in LOCS:
    digest.update(f"\0{field}\0".encode() + getattr(split, field).astype("<i8").tobytes())
  return digest.hexdigest()


def fingerprint(split: Split) -> str:
  """SHA-256 (hex) of names, class lists, labels and rows; not of paths, which differ between machines."""
  digest = hashlib.sha256(rows_digest(split).encode())
  for field in ("name", "raw_names_k", "names_k", "seen", "unseen", "validation"):
    digest.update(f"\0{field}\0{getattr(split, field)!r}".encode())
  for field in ("labels_n", "train_loc", "val_loc"):
    value = getattr(split, field)
    digest.update(f"\0{field}\0".encode() + (b"" if value is None else value.astype("<i8").tobytes()))
  return digest.hexdigest()


def other_release(split: Split) -> bool:
  """Whether the rows are of an archive that need not be release 1.0: it has others, and neither train_loc nor val_loc.

  So it is with release 2.0. Without labels, which show that rows fit their lists, nothing tells such rows from damage.
  """
  return (split.seed is None and split.labels_n is not None and split.train_loc is None and split.val_loc is None
          and rows_digest(split) != PUBLISHED_ROWS[split.name])


def differences(split: Split) -> list[str]:
  """What is not as published, a line each.

  Where rows of seen images need not be those of release 1.0, in our own division and in an `other_release`, only their
  total number is compared.
  """
  found, wanted = dict(counts(split)), dict(PUBLISHED[split.name])
  free = split.seed is not None or other_release(split)
  if free:
    for numbers in (found, wanted):
      numbers["trainval + test_seen"] = numbers.pop("trainval") + numbers.pop("test_seen")
  lines = [f"{key}: {found[key]}, published {wanted[key]}" for key in wanted if found[key] != wanted[key]]
  published = published_classes(split.name)
  if split.raw_names_k != tuple(published):
    strange, missing = set(split.raw_names_k) - set(published), set(published) - set(split.raw_names_k)
    parts = [f"{what} {some(sorted(names))}" for what, names in (("not published:", strange), ("missing:", missing))
             if names]
    lines.append(f"class names: {'; '.join(parts) or 'not in the published order'}")
  for field in ("unseen", "validation"):
    here = {split.raw_names_k[k] for k in getattr(split, field)}
    wrong = here ^ {raw for raw, part in published.items() if part == field}
    if wrong:
      lines.append(f"{field} classes: {some(sorted(wrong))} not as published")
  if not lines and not free and rows_digest(split) != PUBLISHED_ROWS[split.name]:
    lines.append("rows: their numbers are as published, but they are other images than in the files of published code")
  return lines


def some(names: Iterable[str], most: int = 5) -> str:
  """The first few of many names."""
  names = list(names)
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
