"""CUB and FLO as TFDS prepares them, beside the same picture files; TensorFlow is not there to help."""

import importlib.abc
import importlib.machinery
import json
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
from digzsl_jax.data import pictures, splits
from tests import prepared_tfds, small_archive
from tests.test_photographs import cub, load, load_cub, paths, write_picture  # noqa: F401 (a fixture)


class NoTensorFlow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds TensorFlow, as where it is installed, and ends the test that imports it."""

  def find_spec(self, name, path=None, target=None):
    return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None

  def exec_module(self, module):
    pytest.fail("TensorFlow was imported")


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
  monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
  with pytest.raises(pytest.fail.Exception):
    import tensorflow  # noqa: F401
  yield
  assert "tensorflow" not in sys.modules


@pytest.fixture
def prepared_cub(cub):  # noqa: F811
  """`(folder without photographs, data_dir)` beside `cub`."""
  folder = cub.with_name("rows")
  shutil.copytree(cub, folder, ignore=shutil.ignore_patterns("images"))
  prepared_tfds.cub(cub.with_name("tfds"), cub / "images")
  return folder, cub.with_name("tfds")


def load_tfds(name, folder, data_dir, **changes):
  return load(folder, name=name, source="tfds", data_dir=str(data_dir), **changes)


def assert_same(got, wanted):
  """Names, lists, labels, paths, contents; and pixels."""
  assert splits.fingerprint(got) == splits.fingerprint(wanted)
  for part in ("train", "test_seen", "test_unseen"):
    one, other = (getattr(data, part).images_nhwc for data in (got, wanted))
    assert one.files == other.files  # and with them the key under which features are kept
    np.testing.assert_array_equal(one[:], other[:])


def test_cub_is_as_from_files(cub, prepared_cub, monkeypatch):  # noqa: F811
  with monkeypatch.context() as patched:
    patched.setattr(pictures, "decode", lambda *_: pytest.fail("decoded"))
    got = load_tfds("cub", *prepared_cub)
  assert "rows of att_splits.mat" in got.notes[0]
  assert_same(got, load_cub(cub))
  drawn = load_tfds("cub", *prepared_cub, train_per_class=2, size=9)
  assert_same(drawn, load_cub(cub, train_per_class=2, size=9))
  np.testing.assert_array_equal(drawn.train.images_nhwc[1], drawn.train.take([1]).images_nhwc[:][0])


def test_cub_without_published_rows(cub, prepared_cub):  # noqa: F811
  folder, data_dir = prepared_cub
  for each in (folder, cub):
    (each / "res101.mat").unlink()
  got = load_tfds("cub", folder, data_dir)
  assert "divided 80/20 a class by seed 0" in got.notes[0]
  assert_same(got, load_cub(cub))
  for part in (got.train, got.test_unseen):
    assert [path.split("/")[1][4:].replace("_", " ").lower() for path in paths(part)] == [
        got.names[label] for label in part.labels_n]


def test_cub_and_a_folder_that_contradicts_it(cub, prepared_cub):  # noqa: F811
  _, data_dir = prepared_cub
  assert_same(load_tfds("cub", cub, data_dir), load_cub(cub))
  (cub / "images" / small_archive.NAMES[0] / "picture_1.jpg").unlink()
  with pytest.raises(ValueError, match="lists 29 images and caltech_birds2011 of TFDS in .* has 30; .*: "
                                       "images/002.Laysan_Albatross/picture_1.jpg. Prepare"):
    load_tfds("cub", cub, data_dir)


def test_cub_lacks_an_image_of_the_archive(cub, prepared_cub):  # noqa: F811
  folder, _ = prepared_cub
  (cub / "images" / small_archive.NAMES[0] / "picture_1.jpg").unlink()
  prepared_tfds.cub(cub.with_name("less"), cub / "images")
  with pytest.raises(ValueError, match="picture_1.jpg of res101.mat is not there; unpack or prepare"):
    load_tfds("cub", folder, cub.with_name("less"))


def test_flo_is_as_from_files(tmp_path):
  folder, data_dir = prepared_tfds.flo_folder(tmp_path / "FLO", write_picture), tmp_path / "tfds"
  prepared_tfds.flo(data_dir, folder)
  wanted = load(folder, name="flo")
  shutil.move(folder / "jpg", tmp_path / "jpg")
  got = load_tfds("flo", folder, data_dir)
  shutil.move(tmp_path / "jpg", folder / "jpg")
  assert_same(got, wanted)
  assert len(got.names) == 102 and len(got.train.labels_n) == 82 and "rows of att_splits.mat" in got.notes[0]
  (folder / "setid.mat").unlink()
  with pytest.raises(ValueError, match="rows of att_splits.mat count in the order of Oxford's setid.mat, which .* put"):
    load_tfds("flo", folder, data_dir)
  # Without the archive, classes are known all the same.
  (folder / "att_splits.mat").unlink()
  divided = load_tfds("flo", folder, data_dir)
  assert "divided 80/20" in divided.notes[0]
  label_of = lambda data: {path: label for part in (data.train, data.test_seen, data.test_unseen)
                           for path, label in zip(paths(part), part.labels_n.tolist())}
  assert label_of(divided) == label_of(wanted)


@pytest.mark.parametrize("change", ["absent", "tfrecord"])
def test_what_is_not_prepared_is_named(prepared_cub, change):
  folder, data_dir = prepared_cub
  [info] = data_dir.rglob("dataset_info.json")
  if change == "absent":
    shutil.rmtree(data_dir)
  else:
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
  with pytest.raises(ValueError, match="config.data: there is no caltech_birds2011 of TFDS in .*tfds in array_record "
                                       r"files \(.*TFRECORD.*tfds build caltech_birds2011 --file_format=array_record "
                                       "--data_dir=.*tfds`, or set source=files"):
    load_tfds("cub", folder, data_dir)


def test_damage(prepared_cub):
  folder, data_dir = prepared_cub
  path = next(data_dir.rglob("*-train.array_record*"))
  whole = bytearray(path.read_bytes())
  whole[1000] ^= 255
  path.write_bytes(whole)
  with pytest.raises(ValueError, match="caltech_birds2011 of TFDS in .*: a record cannot be read .*prepare the data"):
    load_tfds("cub", folder, data_dir)


def test_classes_that_the_benchmark_lacks(cub, prepared_cub):  # noqa: F811
  (cub / "images" / small_archive.NAMES[0]).rename(cub / "images" / "201.Dodo")
  with pytest.raises(Exception, match="201|200"):
    prepared_tfds.cub(cub.with_name("other"), cub / "images")
  (cub / "images" / "201.Dodo").rename(cub / "images" / "002.Dodo")
  prepared_tfds.cub(cub.with_name("other"), cub / "images")
  with pytest.raises(ValueError, match="002.Dodo/picture_.*jpg is of class 002.Dodo, which CUB does not have"):
    load_tfds("cub", prepared_cub[0], cub.with_name("other"))
