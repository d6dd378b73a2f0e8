"""The archive of the Proposed Splits, whole and damaged."""

import sys

import numpy as np
import pytest
import scipy.io

from digzsl_jax.data import archives, benchmarks, matlab
from tests.small_archive import EACH, NAMES, SEEN, cells, contents, save_hdf5, write


@pytest.fixture
def small(tmp_path):
  return write(tmp_path / "CUB", *contents())


def check_small(split):
  assert split.raw_names_k == NAMES and split.names_k[3] == "black footed albatross"
  assert split.unseen == (1, 4) and split.seen == (0, 2, 3, 5) and split.seed is None
  assert [split.raw_names_k[k] for k in split.validation] == [SEEN[0]]
  np.testing.assert_array_equal(split.labels_n, np.repeat(np.arange(6), EACH))
  np.testing.assert_array_equal(split.test_seen_loc, [0, 10, 15, 25])
  np.testing.assert_array_equal(split.test_unseen_loc, [5, 6, 7, 8, 9, 20, 21, 22, 23, 24])
  np.testing.assert_array_equal(split.trainval_loc, np.setdiff1d(np.arange(30), [*split.test_seen_loc,
                                                                                *split.test_unseen_loc]))
  np.testing.assert_array_equal(split.attributes_ka, np.arange(18.0).reshape(3, 6).T)
  assert split.paths_n[7] == "images/005.Crested_Auklet/picture_8.jpg"
  assert benchmarks.counts(split) == {"seen": 4, "unseen": 2, "validation": 1, "trainval": 16, "test_seen": 4,
                                      "test_unseen": 10, "images": 30}


def test_archive(small):
  split = archives.load(small)
  check_small(split)
  # The published lists hold all of test_seen_loc.
  np.testing.assert_array_equal(split.val_loc, [1, 2, 3, 4])
  np.testing.assert_array_equal(np.sort(np.concatenate([split.train_loc, split.val_loc])), split.trainval_loc)
  assert "4 seen classes (1 of them for validation), 2 unseen; trainval 16" in benchmarks.summary(split)


def test_archive_of_matlab_73(small, tmp_path):
  newer = write(tmp_path / "new" / "CUB", *contents(), save=save_hdf5)
  split = archives.load(newer)
  check_small(split)
  assert benchmarks.fingerprint(split) == benchmarks.fingerprint(archives.load(small))


def test_release_2(small, tmp_path):
  splits, res101, lists = contents()
  newer = write(tmp_path / "new" / "CUB", {field: splits[field] for field in splits
                                           if field not in ("train_loc", "val_loc")}, res101, lists)
  split = archives.load(newer)
  check_small(split)
  assert split.train_loc is None and split.val_loc is None
  assert benchmarks.rows_digest(split) == benchmarks.rows_digest(archives.load(small))


def test_what_an_archive_may_lack(tmp_path):
  splits, res101, lists = contents()
  del splits["allclasses_names"], splits["att"], res101["image_files"]
  split = archives.load(write(tmp_path / "a", splits, res101, lists), "CUB")
  assert split.raw_names_k == NAMES and split.attributes_ka is None and split.paths_n is None
  splits["allclasses_names"] = cells(NAMES, deeper=True)
  del lists["allclasses.txt"]
  split = archives.load(write(tmp_path / "b", splits, None, lists), "CUB")
  assert split.raw_names_k == NAMES and split.labels_n is None and benchmarks.counts(split)["images"] == 30


def test_divisions_of_the_seen_classes(small):
  for i in (1, 2, 3):
    split = archives.load(small, validation=i)
    assert [split.raw_names_k[k] for k in split.validation] == [SEEN[i - 1]]
  with pytest.raises(ValueError, match="validation is 4"):
    archives.load(small, validation=4)
  (small / "valclasses2.txt").unlink()
  with pytest.raises(ValueError, match="valclasses2.txt is missing"):
    archives.load(small, validation=2)


def shifted(name, by):
  def change(splits, res101, lists):
    for values in (splits, res101):
      for field in values:
        if field == name or name == "loc" and field.endswith("_loc"):
          values[field] = values[field] + by
  return change


def swap(part, one, other):
  def change(*parts):
    parts[part][one], parts[part][other] = parts[part][other], parts[part][one]
  return change


def put(part, field, value):
  def change(*parts):
    parts[part][field] = value(parts[part][field])
  return change


@pytest.mark.parametrize("change, message", [
  (shifted("loc", -1.0), "images are counted from 0, but must be counted from 1"),
  (shifted("loc", 1), "counts 31 images, but there are 30"),
  (shifted("labels", -1), "labels count from 0"),
  (shifted("labels", 1), "label 7 is none of 6 classes"),
  (put(1, "labels", lambda labels: labels[::-1]), "is labelled 006.Least_Auklet; labels are rows of allclasses.txt"),
  (put(1, "labels", lambda labels: labels[1:]), "has 30 image files, but 29 labels"),
  (swap(0, "test_seen_loc", "test_unseen_loc"), "test_seen_loc holds images of 005.Crested_Auklet, 004"),
  (swap(2, "trainvalclasses.txt", "testclasses.txt"), "are for validation, but not seen"),
  (put(0, "test_seen_loc", lambda rows: np.concatenate([rows, [[2]]])),
   "trainval_loc share 1 images, the first is row 1"),
  (put(0, "test_seen_loc", lambda rows: rows[1:]), "test_seen_loc has no image of 006.Least_Auklet"),
  (put(0, "test_seen_loc", lambda rows: np.concatenate([rows, rows])), "repeats an image"),
  (put(0, "test_seen_loc", lambda rows: rows[:0]), "test_seen_loc is empty"),
  (put(0, "att", lambda att: att.T), r"att is \[6, 3\], but must have a column for each of 6 classes"),
  (put(2, "allclasses.txt", lambda names: names[1:]), "differ: 002.Laysan_Albatross"),
  (put(2, "allclasses.txt", lambda names: names[::-1]), "differ: their orders"),
  (put(2, "testclasses.txt", lambda names: names[1:]), "004.Groove_billed_Ani are neither seen nor unseen"),
  (put(2, "testclasses.txt", lambda names: (*names, SEEN[0])), "are both seen and unseen"),
  (put(2, "testclasses.txt", lambda names: ("Ani", *names)), "testclasses.txt: Ani not among all classes"),
  (put(1, "labels", lambda labels: cells(["x"])), "must hold labels, and image_files as text"),
  (put(1, "image_files", lambda files: np.ones(len(files))), "must hold labels, and image_files as text"),
  (put(1, "image_files", lambda files: cells([file[0][0].replace("images", "x") for file in files])), "in no folder"),
])
def test_what_is_wrong_is_said(tmp_path, change, message):
  parts = contents()
  change(*parts)
  with pytest.raises(ValueError, match=message):
    archives.load(write(tmp_path / "CUB", *parts))


def test_a_list_that_is_no_text(small):
  (small / "testclasses.txt").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match="testclasses.txt is no text file"):
    archives.load(small)


def test_rows_of_another_order(tmp_path):
  splits, res101, lists = contents()
  for field in ("labels", "image_files"):
    res101[field] = np.roll(res101[field], 1, axis=0)
  with pytest.raises(ValueError, match="the rows are shifted, or of another order"):
    archives.load(write(tmp_path / "CUB", splits, res101, lists))


@pytest.mark.parametrize("save", [scipy.io.savemat, save_hdf5])
def test_damaged_files(tmp_path, save):
  splits, res101, lists = contents()
  folder = write(tmp_path / "CUB", splits, res101, lists, save)
  whole = (folder / "att_splits.mat").read_bytes()
  for length in (100, len(whole) // 3, len(whole) - 7):
    (folder / "att_splits.mat").write_bytes(whole[:length])
    with pytest.raises(ValueError, match="truncated or no MATLAB file|has no numbers"):
      archives.load(folder)
  del splits["trainval_loc"]
  with pytest.raises(ValueError, match="no numbers trainval_loc"):
    archives.load(write(folder, splits, save=save))


@pytest.mark.parametrize("save, package", [(scipy.io.savemat, "scipy"), (save_hdf5, "h5py")])
def test_absent_packages(tmp_path, monkeypatch, save, package):
  folder = write(tmp_path / "CUB", *contents(), save)
  monkeypatch.setitem(sys.modules, "scipy.io" if package == "scipy" else package, None)
  with pytest.raises(ValueError, match=rf"read with {package}, which is not installed: .*digzsl_jax\[data\]"):
    archives.load(folder)


def test_text_of_matlab_files(tmp_path):
  scipy.io.savemat(tmp_path / "a.mat", {"words": np.array(["abc ", "d"]), "cells": cells(["e ", ""], deeper=True),
                                        "numbers": cells([1, 2])})
  assert matlab.read(tmp_path / "a.mat", ["words", "cells", "none"]) == {"words": ["abc", "d"], "cells": ["e", ""]}
  with pytest.raises(ValueError, match="holds numbers where text is due"):
    matlab.read(tmp_path / "a.mat", ["numbers"])
  with pytest.raises(OSError):
    matlab.read(tmp_path / "b.mat", ["words"])


def test_which_benchmark(small, tmp_path):
  assert archives.load(small).name == archives.load(small.rename(tmp_path / "birds"), "CUB").name == "CUB"
  with pytest.raises(ValueError, match='"BIRDS" is no benchmark; give'):
    archives.load(tmp_path / "birds")
  with pytest.raises(ValueError, match="no folder"):
    archives.load(tmp_path / "SUN")
  (tmp_path / "SUN").mkdir()
  with pytest.raises(ValueError, match="holds neither att_splits.mat"):
    archives.load(tmp_path / "SUN")
