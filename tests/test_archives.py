"""The four benchmarks without pictures: the archive of the Proposed Splits, own layouts, counts, names, the check."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io

from digzsl_jax.data import archives, benchmarks, image_folders, matlab, prompts

# Six of CUB's classes; as in the archive, their order is not that of their numbers, and lists have orders of their own.
NAMES = ("002.Laysan_Albatross", "005.Crested_Auklet", "007.Parakeet_Auklet", "001.Black_footed_Albatross",
         "004.Groove_billed_Ani", "006.Least_Auklet")
UNSEEN = (NAMES[4], NAMES[1])
SEEN = tuple(sorted(set(NAMES) - set(UNSEEN), key=lambda name: name[4:]))
EACH = 5  # images of a class; the first is held out


def cells(texts, deeper=False):
  array = np.empty((len(texts), 1), object)
  for i, text in enumerate(texts):
    array[i, 0] = np.array([[text]], object) if deeper else text
  return array


def save_hdf5(path, variables):
  """As MATLAB does: text as 16-bit numbers, cells as references, dimensions turned round, 512 bytes before it all."""
  h5py = pytest.importorskip("h5py")
  with h5py.File(path, "w", userblock_size=512) as file:
    def text(where, name, value):
      stored = where.create_dataset(name, data=np.array([[ord(letter)] for letter in value], np.uint16))
      stored.attrs["MATLAB_class"] = np.bytes_("char")
      return stored

    for name, value in variables.items():
      if value.dtype != object:
        file[name] = value.T
        continue
      places = file.require_group("#refs#")
      references = np.array([[text(places, f"{name}{i}", str(one)).ref for i, one in enumerate(value.ravel())]],
                            h5py.ref_dtype)
      file.create_dataset(name, data=references).attrs["MATLAB_class"] = np.bytes_("cell")
  with path.open("r+b") as file:
    file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64")


def contents():
  """Variables of both files of a small archive, and its text lists; images go class by class."""
  labels_n = np.repeat(np.arange(len(NAMES)), EACH)
  images_n = np.arange(1, len(labels_n) + 1)
  unseen_n = np.isin(labels_n, [NAMES.index(name) for name in UNSEEN])
  held_n = images_n % EACH == 1
  column = lambda rows: rows[::-1, None].astype(np.uint16)  # in no order, as published
  splits = {"att": np.arange(18.0).reshape(3, 6), "allclasses_names": cells(NAMES),
            "trainval_loc": column(images_n[~unseen_n & ~held_n]),
            "test_seen_loc": column(images_n[~unseen_n & held_n]), "test_unseen_loc": column(images_n[unseen_n]),
            "train_loc": column(images_n[~unseen_n & (labels_n != 0)]), "val_loc": column(images_n[labels_n == 0])}
  files = [f"/BS/work/CUB_200_2011/CUB_200_2011/images/{NAMES[label]}/picture_{image}.jpg  "
           for label, image in zip(labels_n, images_n)]
  res101 = {"labels": labels_n[:, None] + 1.0, "image_files": cells(files), "features": np.zeros((4, len(files)))}
  lists = {"allclasses.txt": NAMES, "trainvalclasses.txt": SEEN, "testclasses.txt": UNSEEN}
  for i in (1, 2, 3):
    lists[f"valclasses{i}.txt"] = SEEN[i - 1:i]
  return splits, res101, lists


def write(folder, splits, res101=None, lists=(), save=scipy.io.savemat):
  folder.mkdir(exist_ok=True, parents=True)
  save(folder / "att_splits.mat", splits)
  if res101:
    save(folder / "res101.mat", res101)
  for file, names in dict(lists).items():
    (folder / file).write_text("".join(f"{name} \n" for name in names) + "\n")
  return folder


@pytest.fixture
def small(tmp_path):
  return write(tmp_path / "CUB", *contents())


def published_archive(folder, name):
  """An archive with the published classes and counts, its rows drawn at random."""
  classes, numbers = benchmarks.published_classes(name), benchmarks.PUBLISHED[name]
  rows, parts = np.random.default_rng(0).permutation(numbers["images"]) + 1, {}
  for part in ("trainval", "test_seen", "test_unseen"):
    parts[f"{part}_loc"], rows = rows[:numbers[part], None], rows[numbers[part]:]
  lists = {"allclasses.txt": classes} if name != "FLO" else {}
  return write(folder / name, {"att": np.ones((3, len(classes))), **parts}, None, lists)


# The archive of the Proposed Splits.

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


# The data sets as their authors lay them out.

def touch(paths):
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def lay_out(name, folder, each=EACH):
  """All classes of a benchmark in the data set's own order and spelling; files only where readers look for them."""
  classes = sorted(benchmarks.published_classes(name))
  if name == "AWA2":
    touch(folder / "JPEGImages" / raw / f"{raw}_{i}.jpg" for raw in classes for i in range(each))
    values_ka = np.arange(1.0, 151).reshape(50, 3)
    np.savetxt(folder / "predicate-matrix-continuous.txt", values_ka)
    (folder / "classes.txt").write_text("".join(f"    {k + 1}\t{raw}\n" for k, raw in enumerate(classes)))
  elif name == "CUB":
    rows = [(number, raw, i) for number, raw in enumerate(classes, 1) for i in range(each)]
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"{number} {raw}\n" for number, raw in enumerate(classes, 1)))
    (folder / "images.txt").write_text("".join(f"{n} {raw}/x_{i}.jpg\n" for n, (_, raw, i) in enumerate(rows, 1)))
    (folder / "image_class_labels.txt").write_text("".join(f"{n} {row[0]}\n" for n, row in enumerate(rows, 1)))
  elif name == "FLO":
    numbers_n = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 103), each))  # files are in no order
    parts = np.split(np.argsort(numbers_n, kind="stable").reshape(102, each) + 1, [1, 2], axis=1)
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": numbers_n[None]})
    scipy.io.savemat(folder / "setid.mat", {part: rows.reshape(1, -1) for part, rows in
                                            zip(("trnid", "valid", "tstid"), parts)})
  else:
    nested = {raw: raw.replace("_outdoor", "/outdoor").replace("_indoor", "/indoor") for raw in classes}
    touch(folder / "images" / raw[0] / place / f"sun_{i}.jpg" for raw, place in nested.items() for i in range(each))
  return folder


USUAL = {"AWA2": "Animals_with_Attributes2", "CUB": "CUB_200_2011", "FLO": "flowers-102",
         "SUN": "SUNAttributeDB_Images"}


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_own_layouts(tmp_path, name):
  each = {"SUN": 2}.get(name, EACH)
  folder = lay_out(name, tmp_path / name / USUAL[name], each).parent
  split, numbers = archives.load(folder), benchmarks.PUBLISHED[name]
  assert split.raw_names_k == tuple(benchmarks.published_classes(name)) and split.seed == 0
  found = benchmarks.counts(split)
  assert {key: found[key] for key in ("seen", "unseen", "validation")} == {key: numbers[key] for key in
                                                                         ("seen", "unseen", "validation")}
  assert found["test_seen"] == numbers["seen"] and found["trainval"] == numbers["seen"] * (each - 1)
  assert found["test_unseen"] == numbers["unseen"] * each
  for label in (0, len(split.raw_names_k) - 1):  # every image is of the class whose folder it is in
    files = [split.paths_n[n] for n in np.flatnonzero(split.labels_n == label)]
    assert len(files) == each and all(file.startswith(f"{USUAL[name]}/") for file in files)
    assert all(image_folders.same_class(name, file, split.raw_names_k[label]) for file in files)
  assert "divided 80/20 a class by seed 0" in benchmarks.summary(split)
  again, other = archives.load(folder), archives.load(folder, seed=1)
  np.testing.assert_array_equal(split.trainval_loc, again.trainval_loc)
  assert not np.array_equal(split.trainval_loc, other.trainval_loc)
  inside = archives.load(folder / USUAL[name], name)  # the data set's own folder
  assert f"{USUAL[name]}/{inside.paths_n[3]}" == split.paths_n[3]
  assert benchmarks.fingerprint(inside) == benchmarks.fingerprint(split)
  # With another number of images than published the check says so, but not of our own division.
  wrong = " ".join(benchmarks.differences(split))
  assert "trainval + test_seen" in wrong and "classes" not in wrong and "rows" not in wrong


def test_own_attributes(tmp_path):
  split = archives.load(lay_out("AWA2", tmp_path / "AWA2"))
  row_ka = np.arange(1.0, 151).reshape(50, 3)[sorted(split.raw_names_k).index("walrus")]
  np.testing.assert_allclose(split.attributes_ka[split.raw_names_k.index("walrus")], row_ka / np.linalg.norm(row_ka))
  (tmp_path / "AWA2" / "classes.txt").write_text("1 walrus\n")
  with pytest.raises(ValueError, match="do not give attributes of every class"):
    archives.load(tmp_path / "AWA2")


def test_sun_by_its_list(tmp_path):
  folder = lay_out("SUN", tmp_path / "SUN", 2)
  by_folders = archives.load(folder)
  files = [file.removeprefix("images/") for file in by_folders.paths_n]
  (folder / "SUNAttributeDB").mkdir()
  scipy.io.savemat(folder / "SUNAttributeDB" / "images.mat", {"images": cells(files)})
  shutil.rmtree(folder / "images")
  assert benchmarks.fingerprint(archives.load(folder)) == benchmarks.fingerprint(by_folders)
  scipy.io.savemat(folder / "SUNAttributeDB" / "images.mat", {"images": np.ones(3)})
  with pytest.raises(ValueError, match="must hold the image files"):
    archives.load(folder)


def test_flowers_with_published_rows(tmp_path):
  folder = lay_out("FLO", tmp_path / "FLO")
  labels_n = archives.load(folder).labels_n
  np.testing.assert_array_equal(labels_n, [*range(102), *range(102), *np.repeat(range(102), 3)])
  images_n, unseen_n = np.arange(1, len(labels_n) + 1), labels_n < 20
  rows = {"trainval_loc": images_n[~unseen_n & (images_n > 102)], "test_seen_loc": images_n[20:102],
          "test_unseen_loc": images_n[unseen_n]}
  write(folder, rows)
  split = archives.load(folder)
  assert split.seed is None and benchmarks.counts(split)["test_seen"] == 82
  assert split.names_k[0] == "pink primrose" and split.unseen == tuple(range(20))
  image = int(split.paths_n[150].removeprefix("jpg/image_").removesuffix(".jpg"))
  numbers_n = scipy.io.loadmat(folder / "imagelabels.mat")["labels"].ravel()
  assert numbers_n[image - 1] == split.labels_n[150] + 1
  files = cells([f"/BS/data/{path}" for path in split.paths_n])
  write(folder, rows, {"labels": split.labels_n[:, None] + 1, "image_files": files})
  assert benchmarks.fingerprint(archives.load(folder)) == benchmarks.fingerprint(split)
  write(folder, rows, {"labels": split.labels_n[::-1, None] + 1, "image_files": files})
  with pytest.raises(ValueError, match="jpg is labelled blackberry lily"):
    archives.load(folder)
  (folder / "res101.mat").unlink()
  write(folder, {field: (values + 1) % len(labels_n) + 1 for field, values in rows.items()})
  with pytest.raises(ValueError, match="the rows are shifted, or of another order"):
    archives.load(folder)


def test_archive_beside_the_data_set(tmp_path):
  splits, res101, lists = contents()
  folder = write(tmp_path / "CUB", splits, res101, lists)
  pictures = folder / "CUB_200_2011" / "images"
  paths = [str(file[0]).split("/images/")[1].strip() for file in res101["image_files"][:, 0:1]]
  touch(pictures / path for path in paths)
  split = archives.load(folder)
  assert all((folder / path).is_file() for path in split.paths_n) and split.seed is None
  (pictures / paths[3]).unlink()
  with pytest.raises(ValueError, match=f"{paths[3]} of res101.mat is not there"):
    archives.load(folder)
  (folder / "res101.mat").unlink()  # nothing says which image a row is
  assert archives.load(folder).seed == 0


@pytest.mark.parametrize("file, text, message", [
  ("images.txt", "1 001.Black_footed_Albatross/x.jpg\n", "has 1 images, image_class_labels.txt 1000"),
  ("classes.txt", "1\n", "lines of a number and a value"),
  ("classes.txt", None, "classes.txt is missing"),
  ("classes.txt", "".join(f"{k} 00{k}.Bird\n" for k in range(1, 201)), "is labelled 001.Bird"),
])
def test_contradictions_in_cub(tmp_path, file, text, message):
  path = lay_out("CUB", tmp_path / "CUB") / file
  path.unlink() if text is None else path.write_text(text)
  with pytest.raises(ValueError, match=message):
    archives.load(tmp_path / "CUB")


def test_some_classes_and_strange_ones(tmp_path):
  folder = tmp_path / "AWA2"
  touch(folder / "JPEGImages" / raw / f"{i}.jpg" for raw in ("ox", "fox", "bat", "pig") for i in range(3))
  split = archives.load(folder)
  assert split.raw_names_k == ("ox", "fox", "bat", "pig") and split.unseen == (2,)
  assert "missing: antelope, beaver" in " ".join(benchmarks.differences(split))
  touch([folder / "JPEGImages" / "wolf" / "1.jpg"])
  with pytest.raises(ValueError, match="wolf has one image"):
    archives.load(folder)
  touch([folder / "JPEGImages" / "unicorn" / "1.jpg"])
  with pytest.raises(ValueError, match="AWA2 has no class unicorn"):
    archives.load(folder)
  for raw in ("ox", "fox", "pig", "wolf", "unicorn"):
    shutil.rmtree(folder / "JPEGImages" / raw)
  with pytest.raises(ValueError, match="no seen class"):
    archives.load(folder)


def test_wrong_flower_files(tmp_path):
  folder = lay_out("FLO", tmp_path / "FLO")
  setid = scipy.io.loadmat(folder / "setid.mat")
  parts = {part: setid[part] for part in ("trnid", "valid", "tstid")}
  for changed in ({part: rows - 1 for part, rows in parts.items()}, parts | {"valid": parts["trnid"]}):
    scipy.io.savemat(folder / "setid.mat", changed)
    with pytest.raises(ValueError, match="each of the 510 images .* once, counted from 1"):
      archives.load(folder)
  scipy.io.savemat(folder / "setid.mat", parts)
  scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.zeros((1, 510))})
  with pytest.raises(ValueError, match="labels go from 0 to 0"):
    archives.load(folder)


# Counts, fingerprints and the command.

def test_fingerprint(small):
  split = dataclasses.replace(archives.load(small), train_loc=None)
  changes = {"name": "SUN", "seen": split.seen[::-1], "validation": split.validation * 2,
             "labels_n": np.append(split.labels_n, np.int32(1)), "trainval_loc": split.trainval_loc[:-1],
             "test_unseen_loc": split.test_unseen_loc[1:], "val_loc": None,
             "raw_names_k": tuple(name.replace("Auklet", "Auk") for name in NAMES)}
  changed = [dataclasses.replace(split, **{field: value}) for field, value in changes.items()]
  assert len({benchmarks.fingerprint(one) for one in (split, *changed)}) == len(changes) + 1
  moved = dataclasses.replace(split, paths_n=None, attributes_ka=None)
  assert benchmarks.fingerprint(moved) == benchmarks.fingerprint(split)


def run(capsys, *arguments):
  with pytest.raises(SystemExit) as stopped:
    archives.main(["--check", *map(str, arguments)])
  return stopped.value.code, capsys.readouterr().out


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_published_counts_pass(tmp_path, monkeypatch, capsys, name):
  folder = published_archive(tmp_path, name)
  status, said = run(capsys, tmp_path)
  assert status == 1 and "rows: their numbers are as published, but they are other images" in said
  monkeypatch.setitem(benchmarks.PUBLISHED_ROWS, name, benchmarks.rows_digest(archives.load(folder)))
  status, said = run(capsys, tmp_path)
  assert status == 0 and said.count(" ok\n") == 7 and "DIFFERS" not in said and "fingerprint" in said
  assert "not there: " in said and run(capsys, folder)[0] == run(capsys, folder, "--name", name)[0] == 0


def test_other_counts_fail(tmp_path, capsys):
  folder = published_archive(tmp_path, "AWA2")
  found = scipy.io.loadmat(folder / "att_splits.mat")
  rows = {field: found[field] for field in benchmarks.LOCS}
  write(folder, rows | {"trainval_loc": rows["trainval_loc"][1:]})
  status, said = run(capsys, folder)
  assert status == 1 and "DIFFERS  trainval: 23526, published 23527" in said
  # Two classes change places: all numbers are right.
  names = list(benchmarks.published_classes("AWA2"))
  names[0], names[6] = names[6], names[0]
  write(folder, rows, None, {"allclasses.txt": names})
  status, said = run(capsys, folder)
  assert status == 1 and "class names: not in the published order" in said


def test_module_runs(tmp_path):
  """In a process of its own, a wrong folder ends it with status 1 and a message."""
  done = subprocess.run([sys.executable, "-m", "digzsl_jax.data.archives", "--check", tmp_path / "none"],
                        capture_output=True, text=True)
  assert done.returncode == 1 and "there is no folder" in done.stdout and not done.stderr


# Class names.

@pytest.mark.parametrize("raw, name", [
  ("grizzly+bear", "grizzly bear"), ("001.Black_footed_Albatross", "black footed albatross"),
  ("141.Artic_Tern", "arctic tern"), ("athletic_field_outdoor", "outdoor athletic field"), ("lean-to", "lean-to"),
  ("train_station_station", "train station"), ("bus_interior", "bus interior"),
  ("pink-yellow dahlia?", "pink-yellow dahlia"), ("cyclamen ", "cyclamen"),
  ("lotus lotus", "lotus"), ("balcony_exterior", "balcony exterior"),
])
def test_clean(raw, name):
  assert benchmarks.clean(raw) == name


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_class_names(name):
  """The files that are shipped follow the rule and have the published numbers of classes."""
  folder = pathlib.Path(benchmarks.__file__).parent / "class_names"
  rows = [line.split("\t") for line in (folder / f"{name.lower()}.txt").read_text().splitlines()[1:]]
  assert [clean for _, clean, _ in rows] == [benchmarks.clean(raw) for raw, _, _ in rows]
  assert len({clean for _, clean, _ in rows}) == len(rows)
  parts, numbers = [part for _, _, part in rows], benchmarks.PUBLISHED[name]
  assert parts.count("unseen") == numbers["unseen"] and parts.count("validation") == numbers["validation"]
  assert parts.count("train") == numbers["seen"] - numbers["validation"]
  # No other words than the raw name's, but for spelling.
  assert all(len(clean) <= len(raw) + 2 for raw, clean, _ in rows)


def test_templates():
  assert len(prompts.TEMPLATES["imagenet80"]) == len(set(prompts.TEMPLATES["imagenet80"])) == 80
  for templates in prompts.TEMPLATES.values():
    for template in templates:
      prompts.check_template(template)
  assert {name.lower() for name in benchmarks.PUBLISHED} < set(prompts.TEMPLATES)
  assert prompts.expand(prompts.TEMPLATES["sun"], ["zoo", "home_office"]) == [
    ["a photo of a zoo.", "a photo of the zoo."], ["a photo of a home office.", "a photo of the home office."]]


# The real lists.

def test_real_archives(real_data, capsys):
  status, said = run(capsys, real_data / "zsl")
  assert status == 0 and said.count(" ok\n") == 28 and said.count("fingerprint") == 4


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_real_names_and_attributes(real_data, name):
  folder = real_data / "zsl" / name
  split = archives.load(folder)
  if name == "FLO":
    names = json.loads((folder / "cat_to_name.json").read_text())
    assert split.names_k == tuple(benchmarks.clean(names[str(k + 1)]) for k in range(102))
    assert split.unseen == tuple(range(20)) and split.validation == tuple(range(20, 40))
    unseen, validation = split.test_unseen_loc, split.val_loc
    # Whole classes are unseen, in each of Oxford's three parts.
    assert np.sum(unseen < 1020) == np.sum((1020 <= unseen) & (unseen < 2040)) == 200
    assert not np.intersect1d(unseen, validation).size
    return
  lines = lambda file: {line.strip() for line in (folder / file).read_text().splitlines() if line.strip()}
  assert {split.raw_names_k[k] for k in split.seen} == lines("trainvalclasses.txt")
  assert {split.raw_names_k[k] for k in split.unseen} == lines("testclasses.txt")
  np.testing.assert_allclose(np.linalg.norm(split.attributes_ka, axis=1), 1, rtol=1e-6)
  for i in (2, 3):
    assert {split.raw_names_k[k] for k in archives.load(folder, validation=i).validation} == lines(
      f"valclasses{i}.txt")


def test_real_cub_in_numbers(real_data):
  """Labels are no folder numbers: the archive's order of classes is one of its own."""
  split = archives.load(real_data / "zsl" / "CUB")
  assert [int(raw[:3]) for raw in split.raw_names_k[:4]] == [2, 3, 5, 7]
  assert sorted(int(split.raw_names_k[k][:3]) for k in split.unseen)[:5] == [4, 12, 23, 26, 28]


def damage(folder, how):
  path = folder / "att_splits.mat"
  if how == "truncated":
    path.write_bytes(path.read_bytes()[:-20000])
  elif how == "class removed":
    lines = (folder / "testclasses.txt").read_text().split("\n")
    (folder / "testclasses.txt").write_text("\n".join(lines[1:]))
  else:
    found = {name: value for name, value in scipy.io.loadmat(path).items() if not name.startswith("__")}
    if how == "from 0":
      found |= {name: value.astype(int) - 1 for name, value in found.items() if name.endswith("_loc")}
    else:
      found["trainval_loc"], found["test_seen_loc"] = found["test_seen_loc"], found["trainval_loc"]
    scipy.io.savemat(path, found)


@pytest.mark.parametrize("how, message", [
  ("from 0", "images are counted from 0"), ("truncated", "truncated or no MATLAB file"),
  ("class removed", "are neither seen nor unseen"), ("swapped", "DIFFERS  trainval: "),
])
@pytest.mark.parametrize("name", ["AWA2", "CUB", "SUN"])
def test_damaged_copies_of_real_archives(real_data, tmp_path, capsys, name, how, message):
  shutil.copytree(real_data / "zsl" / name, tmp_path / name, copy_function=shutil.copyfile)
  (tmp_path / name).chmod(0o755)
  damage(tmp_path / name, how)
  status, said = run(capsys, tmp_path)
  assert status == 1 and message in said


def test_real_bird_folders(real_data):
  """Photographs of half of CUB's classes, in folders, with numbers of their own for the images."""
  split = archives.load(real_data / "cub100", "CUB")
  lines = lambda file: set((real_data / "cub100" / file).read_text().split())
  assert {split.raw_names_k[k] for k in split.seen} == lines("seen.txt")
  assert {split.raw_names_k[k] for k in split.unseen} == lines("unseen.txt")
  assert len(split.validation) == 26 and benchmarks.counts(split)["images"] == 5902
  assert all((real_data / "cub100" / path).is_file() for path in split.paths_n[::500])
