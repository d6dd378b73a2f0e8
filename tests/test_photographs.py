"""Data sets of picture files: the benchmarks' and a person's own."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from digzsl_jax.data import datasets, splits
from tests import small_archive

CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox")
EACH = 5


def write_picture(path, seed, size=(14, 11)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def class_folders(root, names=CLASSES, each=EACH, seed=0):
  for k, name in enumerate(names):
    for i in range(each):
      write_picture(root / name / f"{i}.{'jpg' if i % 2 else 'PNG'}", (seed, k, i))
  return root


@pytest.fixture
def zoo(tmp_path):
  class_folders(tmp_path / "zoo")
  (tmp_path / "zoo" / "unseen.txt").write_text("emu\n\nfox\n")
  return tmp_path / "zoo"


def load(folder, **changes):
  return datasets.load({"name": "folder", "folder": str(folder), "size": 8} | changes)


def counts(part):
  return np.bincount(part.labels_n, minlength=6).tolist()


def paths(*parts):
  return [file.path for part in parts for file in part.images_nhwc.files]


def test_own_folder(zoo):
  data = load(zoo)
  assert (data.name, data.names, data.seen, data.unseen) == ("zoo", CLASSES, (0, 1, 2, 3), (4, 5))
  assert len(data.validation) == 1 and data.real_unseen is None and data.notes == ()
  assert [counts(part) for part in (data.train, data.test_seen, data.test_unseen)] == [
      [4] * 4 + [0] * 2, [1] * 4 + [0] * 2, [0] * 4 + [5] * 2]
  used = paths(data.train, data.test_seen, data.test_unseen)
  assert len(set(used)) == len(CLASSES) * EACH
  for part in (data.train, data.test_seen, data.test_unseen):
    assert [path.split("/")[0] for path in paths(part)] == [CLASSES[label] for label in part.labels_n]
    assert part.images_nhwc[:].shape == (len(part.labels_n), 8, 8, 3)
  assert splits.fingerprint(load(zoo)) == splits.fingerprint(data)
  others = [load(zoo, seed=seed) for seed in range(1, 5)]
  assert any(paths(other.train) != paths(data.train) for other in others)
  assert len({other.validation for other in (data, *others)}) > 1
  shutil.copytree(zoo, zoo.parent / "elsewhere" / "zoo")
  assert splits.fingerprint(load(zoo.parent / "elsewhere" / "zoo")) == splits.fingerprint(data)


def test_the_draw_of_a_class_depends_on_no_other(zoo):
  before = load(zoo)
  class_folders(zoo, ["aardvark"], seed=7)
  after = load(zoo)
  assert set(paths(before.train)) < set(paths(after.train))
  fewer = load(zoo, train_per_class=2, test_per_class=1)
  assert counts(fewer.train)[:5] == [2] * 5 and counts(fewer.test_unseen)[5] == 1
  assert set(paths(fewer.train)) < set(paths(after.train))


def test_number_and_share_of_validation_classes(zoo):
  assert [len(load(zoo, validation=value).validation) for value in (0.01, 0.5, 1, 2, 2.0)] == [1, 2, 1, 2, 2]
  for wrong in (0, -1, 1.5, 3, 0.9):
    with pytest.raises(ValueError, match=f"config.data: validation is {wrong}; it must be a number from 1 to 2 of"):
      load(zoo, validation=wrong)


def test_test_folder_of_its_own(zoo):
  shutil.rmtree(zoo / "fox")
  class_folders(zoo.parent / "test", ("ant", "bee", "cat", "dog", "fox"), 2, seed=1)
  shutil.copy(zoo / "ant" / "0.PNG", zoo.parent / "test" / "ant" / "again.png")
  data = load(zoo, test=str(zoo.parent / "test"))
  assert [counts(part) for part in (data.train, data.test_seen, data.test_unseen)] == [
      [5] * 4 + [0] * 2, [3, 2, 2, 2, 0, 0], [0] * 4 + [5, 2]]
  assert "../test/ant/0.PNG" in paths(data.test_seen) and data.test_unseen.images_nhwc[:].any()
  [note] = data.notes
  assert note == "warning: 1 test pictures are training pictures too: ../test/ant/again.png"


def test_what_is_no_picture_is_left_out_and_noted(zoo):
  (zoo / "ant" / "readme.txt").write_text("ants")
  (zoo / "ant" / "._0.jpg").write_text("of another system")
  (zoo / ".cache").mkdir()
  write_picture(zoo / "bee" / "deeper" / "more.png", 9)
  data = load(zoo)
  assert data.notes == ("left out 1 files that are no pictures by suffix: ant/readme.txt",)
  assert counts(data.train)[:2] == [4, 5]


def spoil(path):
  path.write_bytes(path.read_bytes()[:-30])


def test_damaged_files(zoo):
  spoil(zoo / "ant" / "1.jpg")
  spoil(zoo / "fox" / "2.PNG")
  with pytest.raises(ValueError, match=r"2 picture files cannot be read: .*ant/1\.jpg .*truncated.*fox/2\.PNG .*"
                                       "Replace or delete them, or set skip_damaged=True"):
    load(zoo)
  data = load(zoo, skip_damaged=True)
  assert data.notes == ("left out 2 damaged files: ant/1.jpg, fox/2.PNG",)
  assert counts(data.test_unseen) == [0] * 4 + [5, 4]
  for part in (data.train, data.test_seen, data.test_unseen):
    part.images_nhwc[:]
  (zoo / "ant" / "1.jpg").unlink()
  assert splits.fingerprint(load(zoo, skip_damaged=True)) != splits.fingerprint(data)


@pytest.mark.parametrize("change, settings, message", [
    (lambda zoo: (zoo / "unseen.txt").write_text("emu\nfix\n"), {},
     "unseen.txt: 'fix' has no class folder, .* The nearest are 'fox'"),
    (lambda zoo: (zoo / "unseen.txt").write_text("emu\nhippopotamus\n"), {}, "'hippopotamus' has no .* No other name"),
    (lambda zoo: (zoo / "unseen.txt").write_text("\n"), {}, "unseen.txt must name at least one"),
    (lambda zoo: (zoo / "unseen.txt").write_text("emu\nemu\n"), {}, "each on one line and once"),
    (lambda zoo: (zoo / "unseen.txt").unlink(), {}, "there is no list of unseen classes .*unseen.txt; write"),
    (lambda zoo: (zoo / "gnu").mkdir(), {}, "class folder .*gnu has no picture"),
    (lambda zoo: (zoo / "unseen.txt").write_text("\n".join(CLASSES[2:])), {}, "there are 2 seen classes, but 3"),
    (lambda zoo: [(zoo / "dog" / f"{i}.{suffix}").unlink() for i, suffix in ((0, "PNG"), (1, "jpg"), (2, "PNG"))], {},
     "seen classes need 3 or more pictures each, .*: dog have fewer"),
    (lambda zoo: class_folders(zoo.parent / "test", ("ant", "bee", "cat", "dog", "emo")), {"test": "test"},
     "class folder 'emo', which is neither .*nearest are 'emu'"),
    (lambda zoo: class_folders(zoo.parent / "test", ("ant", "bee", "dog")), {"test": "test"},
     "test has no pictures of the seen classes cat; add"),
    (lambda zoo: None, {"test": "nowhere"}, "there is no folder .*nowhere"),
    (lambda zoo: (zoo.parent / "test").mkdir(), {"test": "test"}, "test has no class folders"),
    (lambda zoo: None, {"size": 0}, "size is 0; it must be"),
    (lambda zoo: None, {"train_per_class": -1}, ".train_per_class is -1; it must be at least 0"),
])
def test_mistakes_are_named(zoo, change, settings, message):
  change(zoo)
  if "test" in settings:
    settings = {"test": str(zoo.parent / settings["test"])}
  with pytest.raises(ValueError, match=f"config.data.*{message}"):
    load(zoo, **settings)


def test_folder_is_needed():
  with pytest.raises(ValueError, match='config.data: folder needs the setting "folder"'):
    datasets.load({"name": "folder"})


@pytest.fixture
def cub(tmp_path):
  """A small archive of six classes with its photographs."""
  found, res101, lists = small_archive.contents()
  folder = small_archive.write(tmp_path / "cub", found, res101, lists)
  for i, file in enumerate(res101["image_files"].ravel()):
    write_picture(folder / "images" / file.strip().split("/images/")[1], i)
  return folder


def load_cub(folder, **changes):
  return datasets.load({"name": "cub", "folder": str(folder), "size": 8} | changes)


def test_benchmark(cub):
  data = load_cub(cub)
  assert data.name == "cub" and data.names[0] == "laysan albatross"
  assert {data.names[k] for k in data.unseen} == {"groove billed ani", "crested auklet"}
  assert [counts(part)[0] for part in (data.train, data.test_seen)] == [4, 1]
  assert paths(data.train)[0] == "images/002.Laysan_Albatross/picture_2.jpg"
  assert data.train.images_nhwc[:].shape == (16, 8, 8, 3) and "rows of att_splits.mat" in data.notes[0]
  drawn = load_cub(cub, train_per_class=2, test_per_class=3)
  assert counts(drawn.train)[0] == 2 and counts(drawn.test_unseen)[1] == 3
  assert set(paths(drawn.train)) < set(paths(data.train))
  assert load_cub(cub, validation=2).validation != data.validation


def test_benchmark_with_damaged_and_missing_files(cub):
  first, second = (cub / "images" / "002.Laysan_Albatross" / f"picture_{i}.jpg" for i in (2, 3))
  spoil(first)
  with pytest.raises(ValueError, match="1 picture files cannot be read: .*picture_2.jpg"):
    load_cub(cub)
  data = load_cub(cub, skip_damaged=True)
  assert counts(data.train)[0] == 3 and "left out 1 damaged files" in data.notes[1]
  second.unlink()
  with pytest.raises(ValueError, match="picture_3.jpg"):
    load_cub(cub)


def test_benchmark_without_photographs(cub):
  shutil.rmtree(cub / "images")
  with pytest.raises(ValueError, match="cannot be read: .*there is no such file"):
    load_cub(cub)
  (cub / "res101.mat").unlink()
  with pytest.raises(ValueError, match="config.data: .* holds the rows of CUB but no photographs; unpack"):
    load_cub(cub)


def test_photographs(real_data):
  data = load_cub(real_data / "cub100", size=16, train_per_class=3, test_per_class=2)
  assert (len(data.seen), len(data.unseen), len(data.train.labels_n)) == (73, 27, 219)
  assert len(splits.tasks(data)["validation"].unseen) == len(data.validation) > 0
  assert "divided 80/20 a class by seed 0" in data.notes[0]


@pytest.mark.parametrize("settings, message", [
    ({"name": "awa2", "source": "tfds"}, "TFDS has no AWA2, only CUB and FLO; set source=files"),
    ({"name": "sun", "source": "tfds"}, "TFDS has no SUN"),
    ({"name": "cub", "source": "web"}, 'source is "web": choose files or tfds'),
    ({"name": "cub", "source": "tfds"}, r"source=tfds needs tensorflow_datasets: pip install 'digzsl_jax\[data\]'")])
def test_sources(tmp_path, monkeypatch, settings, message):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it raises ImportError
  with pytest.raises(ValueError, match=f"config.data: {message}"):
    load(tmp_path, **settings)
