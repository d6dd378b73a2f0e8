"""Data sets and tasks: which class may appear where."""

import dataclasses

import numpy as np
import pytest

from digzsl_jax.data import datasets, prompts, splits


def _images(labels, seed: int = 0) -> splits.LabelledImages:
  labels = np.array(labels, np.int32)
  images = np.random.default_rng(seed).integers(256, size=(len(labels), 4, 4, 3)).astype(np.uint8)
  return splits.LabelledImages(images, labels)


def _dataset(**changes) -> splits.Dataset:
  fields = dict(
    name="zoo", names=("ant", "bee", "cat", "dog", "emu", "fox"), seen=(0, 1, 2, 3), unseen=(4, 5),
    validation=(1, 2), train=_images([0, 1, 2, 3] * 9, 0), test_seen=_images([0, 1, 2, 3] * 2, 1),
    test_unseen=_images([4, 5] * 3, 2), real_unseen=_images([5, 4], 3))
  return splits.Dataset(**fields | changes)


@pytest.mark.parametrize("changes, message", [
  (dict(unseen=(3, 4, 5, 0)), "both seen and unseen: ant, dog"),
  (dict(validation=(1, 4)), "validation classes that are not seen: emu"),
  (dict(validation=(0, 1, 2)), "leaves fewer than two"),
  (dict(validation=()), "list of validation classes is empty"),
  (dict(seen=(0, 0, 1, 2, 3)), "list of seen classes repeats"),
  (dict(unseen=(4, 6)), "unseen holds label 6"),
  (dict(names=("ant", "bee", "cat", "dog", "emu", "ant")), "repeat: ant"),
  (dict(train=_images([0, 1, 2, 3, 4])), "train has images of classes outside its list: emu"),
  (dict(test_unseen=_images([4, 5, 77])), r"outside its list: \[77\]"),
  (dict(test_seen=_images([0, 1, 2])), "test_seen has no image of dog"),
  (dict(real_unseen=_images([])), "real_unseen has no images"),
  (dict(test_seen=splits.LabelledImages(np.zeros((8, 4, 4, 1), np.uint8), np.zeros(8, np.int32))), "uint8"),
  (dict(test_seen=splits.LabelledImages(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(7, np.int32))), "int32"),
])
def test_bad_data_sets_are_refused(changes, message):
  with pytest.raises(ValueError, match=f"zoo: .*{message}"):
    _dataset(**changes)


def test_real_unseen_images_may_be_missing():
  data = _dataset(real_unseen=None)
  assert splits.tasks(data)["test"].real_unseen is None
  assert splits.summary(data).endswith("real_unseen 0")


def test_validation_task_divides_the_training_images():
  data = _dataset()
  tasks = splits.tasks(data)
  assert tasks["test"].train is data.train and tasks["test"].unseen == data.unseen
  task = tasks["validation"]
  assert (task.seen, task.unseen) == ((0, 3), (1, 2))
  parts = (task.train, task.test_seen, task.test_unseen, task.real_unseen)
  for part, classes, per_class in zip(parts, (task.seen,) * 2 + (task.unseen,) * 2, (7, 2, 4, 5)):
    assert np.bincount(part.labels_n, minlength=6).tolist() == [per_class * (k in classes) for k in range(6)]
  pieces = [image.tobytes() for part in parts for image in part.images_nhwc]
  assert sorted(pieces) == sorted(image.tobytes() for image in data.train.images_nhwc)
  again = splits.tasks(_dataset())["validation"]
  np.testing.assert_array_equal(again.train.images_nhwc, task.train.images_nhwc)


def test_validation_does_not_depend_on_how_classes_are_interleaved():
  data = _dataset()
  order = np.argsort(data.train.labels_n, kind="stable")
  sorted_task = splits.tasks(_dataset(train=data.train.take(order)))["validation"]
  task = splits.tasks(data)["validation"]
  for field in ("train", "test_seen", "test_unseen", "real_unseen"):
    assert ({i.tobytes() for i in getattr(task, field).images_nhwc}
            == {i.tobytes() for i in getattr(sorted_task, field).images_nhwc})


def test_validation_needs_two_images_a_class():
  with pytest.raises(ValueError, match="fewer: dog"):
    splits.tasks(_dataset(train=_images([0, 0, 1, 1, 2, 2, 3])))


def test_fingerprint_changes_with_everything():
  base = _dataset()
  pixel = base.test_seen.images_nhwc.copy()
  pixel[-1, 0, 0, 0] ^= 1
  changed = [dict(name="park"), dict(names=("ant", "bee", "cat", "dog", "emu", "gnu")),
             dict(validation=(1, 3)), dict(test_seen=base.test_seen._replace(images_nhwc=pixel)),
             dict(real_unseen=None),
             dict(test_unseen=base.test_unseen._replace(labels_n=base.test_unseen.labels_n[::-1]))]
  prints = {splits.fingerprint(dataclasses.replace(base, **change)) for change in [{}, *changed]}
  assert len(prints) == 1 + len(changed)
  assert splits.fingerprint(_dataset()) == splits.fingerprint(base)


def test_summary_counts():
  text = splits.summary(_dataset())
  for piece in ("4 seen classes (2 of them for validation)", "2 unseen", "train 36"):
    assert piece in text


def test_load_dispatches_and_names_unknown_settings():
  data = datasets.load({"name": "scenes", "world": 2, "train_per_class": 4, "test_per_class": 1, "size": 8})
  assert data.name == "scenes2" and data.train.images_nhwc.shape == (144, 8, 8, 3)
  with pytest.raises(ValueError, match='"imagenet": choose one of scenes, fashion_mnist'):
    datasets.load({"name": "imagenet"})
  with pytest.raises(ValueError, match='scenes has no setting "wrold"; it has world'):
    datasets.load({"name": "scenes", "wrold": 1})


def test_prompts():
  assert prompts.prompt("a photo of a {name}", "American_Crow") == "a photo of a American Crow"
  assert [prompts.prompt("{name}!", name) for name in ("{x}", " b  c ")] == ["{x}!", "b c!"]


@pytest.mark.parametrize("template, token, message", [
  ("a photo", False, r"must contain \{name\} once each.*it has no field"),
  ("a {name} {name}", False, "must contain"),
  ("a {token} {name}", False, r"it has \{token\}, \{name\}"),
  ("a {name}", True, r"must contain \{name\} and \{token\}"),
  ("a {name", False, "braces enclose only"),
  ("a {}", False, "must contain"),
])
def test_bad_templates_are_named(template, token, message):
  with pytest.raises(ValueError, match=message):
    prompts.check_template(template, token=token)


def test_empty_class_name():
  with pytest.raises(ValueError, match="'_ ' is empty"):
    prompts.prompt("{name}", "_ ")
