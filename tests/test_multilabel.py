"""Multi-label data sets: the interface, and the embedded world."""

import dataclasses

import numpy as np
import pytest

from digzsl_jax.data import multilabel, multilabel_scenes, scenes, true_masks
from digzsl_jax.data.multilabel import MultilabelDataset, Tagged

NAMES = ("ant", "bee", "cat", "dog")


def tagged(targets, seed=0):
  targets_nk = np.array(targets, np.int8).reshape(-1, len(NAMES))
  images = np.random.default_rng(seed).integers(256, size=(len(targets_nk), 4, 4, 3)).astype(np.uint8)
  return Tagged(images, targets_nk)


TRAIN = [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
TEST = [[0, 0, 1, 1], [1, -1, 0, 0]]


def dataset(**changes):
  fields = dict(name="zoo", names=NAMES, seen=(0, 1, 2), unseen=(3,), train=tagged(TRAIN), test=tagged(TEST, 1))
  return MultilabelDataset(**fields | changes)


@pytest.mark.parametrize("changes, message", [
  (dict(names=("ant", "bee", "cat", "ant")), "repeat: ant"),
  (dict(seen=(0, 1, 2, 3)), "dog are both seen and unseen"),
  (dict(seen=(0, 1, 1, 2)), "bee come twice"),
  (dict(seen=(0, 1)), "cat are neither seen nor unseen"),
  (dict(seen=(), unseen=(0, 1, 2, 3)), "list of seen labels is empty"),
  (dict(unseen=(3, 4)), "column 4, but columns go from 0 to 3"),
  (dict(test=tagged([])), "there are no test images"),
  (dict(train=tagged([[0, 0, 0, 1], [0, -1, 0, 0]])), "no training image holds a seen label"),
  (dict(test=Tagged(np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 4), np.int8))), "images must be uint8"),
  (dict(test=tagged(TEST)._replace(targets_nk=np.zeros((2, 3), np.int8))), r"int8 \[2, 4\], not int8 \[2, 3\]"),
  (dict(test=tagged(TEST)._replace(targets_nk=np.zeros((2, 4)))), r"not float64 \[2, 4\]"),
  (dict(test=tagged(np.array(TEST) * 2)), "must be 1"),
])
def test_bad_data_sets_are_refused(changes, message):
  with pytest.raises(ValueError, match=f"zoo: .*{message}"):
    dataset(**changes)


def test_training_reads_seen_columns_alone():
  data = dataset(seen=(3, 0), unseen=(1, 2))
  assert data.seen_targets().tolist() == [[1, 1], [0, 0], [0, 0]]
  with pytest.raises(ValueError, match="zoo has no training images"):
    dataset(train=tagged([])).seen_targets()
  assert dataset(seen=(0, 1, 2, 3), unseen=()).seen_targets().shape == (3, 4)


def test_rows_with_labels():
  train = dataset().train
  assert multilabel.with_any(train, (0, 1, 2)).tolist() == [0, 1]
  assert multilabel.with_any(train, (3,)).tolist() == [0] and not len(multilabel.with_any(train, (2,)))
  assert multilabel.with_any(tagged(TEST), (1,)).tolist() == []  # not judged is not present
  kept = train.take(multilabel.with_any(train, (1,)))
  np.testing.assert_array_equal(kept.images_nhwc, train.images_nhwc[1:2])
  assert kept.targets_nk.tolist() == [TRAIN[1]]


def test_fingerprint_changes_with_everything():
  data = dataset()
  pixel = data.test.images_nhwc.copy()
  pixel[-1, 0, 0, 0] ^= 1
  changes = [dict(name="park"), dict(names=("ant", "bee", "cat", "gnu")), dict(seen=(0, 1), unseen=(2, 3)),
             dict(test=data.test._replace(images_nhwc=pixel)), dict(notes=("one left out",)),
             dict(train=data.train._replace(targets_nk=data.train.targets_nk[::-1])), dict(train=data.train.take([0]))]
  prints = {multilabel.fingerprint(dataclasses.replace(data, **change)) for change in [{}, *changes]}
  assert len(prints) == 1 + len(changes) and multilabel.fingerprint(dataset()) in prints


def test_summary_counts():
  assert multilabel.summary(dataset()) == (
      "zoo: 3 seen labels, 1 unseen; images of 4x4 pixels: train 3 with 1.00 labels each, test 2 with 1.50 labels each")


@pytest.mark.parametrize("section, message", [
  ({"name": "flickr"}, '"flickr": choose one of scenes'),
  ({"name": "scenes", "wrold": 1}, 'no setting "wrold"'),
  ({"name": "scenes", "train": 0}, "train is 0; it must be at least 1"),
  ({"name": "scenes", "max_objects": 5}, "max_objects is 5"),
  ({"name": "scenes", "world": 9}, "world is 9"),
])
def test_bad_sections_are_named(section, message):
  with pytest.raises(ValueError, match=f"config.data.*{message}"):
    multilabel.load(section)


SMALL = {"name": "scenes", "world": 1, "train": 90, "test": 60}


def test_scenes_keep_unseen_classes_out_of_training():
  data = multilabel.load(SMALL)
  lists = scenes.class_lists(1)
  assert [data.names[k] for k in data.unseen] == [scenes.NAMES[k] for k in lists["unseen"]]
  assert {data.names[k] for k in data.seen} == set(scenes.NAMES) - {data.names[k] for k in data.unseen}
  assert not data.train.targets_nk[:, data.unseen].any()
  for part, columns in ((data.train, data.seen), (data.test, (*data.seen, *data.unseen))):
    positives_k = part.targets_nk[:, columns].sum(0)
    assert positives_k.max() - positives_k.min() <= 1
    assert part.targets_nk.sum(1).tolist() == [1 + i % 4 for i in range(len(part.targets_nk))]
  assert 0.1 < len(multilabel.with_any(data.test, data.unseen)) / 60 < 0.4


def test_scenes_are_the_same_again_and_others_by_seed():
  data, again = multilabel.load(SMALL), multilabel.load(SMALL)
  assert multilabel.fingerprint(data) == multilabel.fingerprint(again)
  more = multilabel.load(SMALL | {"test": 80})
  np.testing.assert_array_equal(more.test.images_nhwc[:60], data.test.images_nhwc)
  np.testing.assert_array_equal(more.test.targets_nk[:60], data.test.targets_nk)
  other = multilabel.load(SMALL | {"seed": 1})
  assert (other.test.targets_nk != data.test.targets_nk).any()
  assert not np.array_equal(data.test.images_nhwc[:60], data.train.images_nhwc[:60])
  assert multilabel.load(SMALL | {"max_objects": 2}).test.targets_nk.sum(1).max() == 2


def test_masks_show_what_the_test_pictures_hold():
  data = multilabel.load(SMALL)
  masks = true_masks.open(SMALL, data)
  shown_nhw = np.stack([masks[n] for n in range(len(masks))])
  assert shown_nhw.dtype == np.int16 and shown_nhw.shape == data.test.images_nhwc.shape[:3]
  for targets_k, image_hwc, shown_hw in zip(data.test.targets_nk, data.test.images_nhwc, shown_nhw):
    assert set(np.flatnonzero(targets_k)) == set(np.unique(shown_hw)) - {-1}
    assert image_hwc[shown_hw == -1].mean() > 190  # target style: bright backgrounds
  for k, name in enumerate(data.names):
    if name.startswith("plain") and name.endswith(("square", "circle")):  # nearly all of which is no outline
      colour = scenes.COLOURS.index(name.split()[1])
      median = np.median(data.test.images_nhwc[shown_nhw == k], axis=0)
      assert np.abs(scenes._RGB - median).sum(1).argmin() == colour, name
  other = true_masks.open(SMALL | {"seed": 1}, data)
  assert masks.fingerprint == true_masks.open(SMALL, data).fingerprint != other.fingerprint


def test_scenes_have_as_many_objects_as_asked():
  columns_no = multilabel_scenes._draw(40, 7, 3, (0, 0))
  assert ((columns_no >= 0).sum(1) == np.arange(40) % 3 + 1).all()
  assert all(len(set(row) - {-1}) == (row >= 0).sum() for row in columns_no)
