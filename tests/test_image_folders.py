"""AWA2, CUB, FLO and SUN as their authors lay them out."""

import shutil

import numpy as np
import pytest
import scipy.io

from digzsl_jax.data import archives, benchmarks, image_folders
from tests.small_archive import EACH, cells, contents, write


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


def test_real_bird_folders(real_data):
  """Photographs of half of CUB's classes, in folders, with numbers of their own for the images."""
  split = archives.load(real_data / "cub100", "CUB")
  lines = lambda file: set((real_data / "cub100" / file).read_text().split())
  assert {split.raw_names_k[k] for k in split.seen} == lines("seen.txt")
  assert {split.raw_names_k[k] for k in split.unseen} == lines("unseen.txt")
  assert len(split.validation) == 26 and benchmarks.counts(split)["images"] == 5902
  assert all((real_data / "cub100" / path).is_file() for path in split.paths_n[::500])
