"""Accuracies, calibration and their edges."""

import numpy as np
import pytest

from digzsl_jax import metrics

NAMES = ("ant", "bee", "cat", "dog")
IS_SEEN = np.array([True, True, False, False])


def random_task(count=200, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(count, 4)) + 1.5 * IS_SEEN
  labels_n = np.concatenate([np.arange(4), rng.integers(0, 4, count - 4)])
  logits[np.arange(count), labels_n] += 1
  return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels_n


def test_classes_weigh_the_same_whatever_their_size():
  labels_n, predictions_n = np.array([0, 0, 0, 2]), np.array([0, 0, 0, 1])
  assert metrics.per_class_accuracy(predictions_n, labels_n, (0, 2), NAMES) == 0.5
  assert metrics.per_image_accuracy(predictions_n, labels_n) == 0.75
  assert metrics.class_accuracies(predictions_n, labels_n, (2, 0), NAMES).tolist() == [0, 1]


def test_images_of_other_classes_are_left_out():
  assert metrics.per_class_accuracy(np.array([0, 1, 1]), np.array([0, 1, 3]), (0, 1), NAMES) == 1


def test_classes_without_images_are_named():
  with pytest.raises(ValueError, match="no test images of bee, dog"):
    metrics.per_class_accuracy(np.array([0, 2]), np.array([0, 2]), range(4), NAMES)
  with pytest.raises(ValueError, match="no images"):
    metrics.per_image_accuracy(np.array([]), np.array([]))
  probabilities_nk, labels_n = random_task()
  with pytest.raises(ValueError, match="no test images of cat"):
    rows_n = labels_n != 2
    metrics.lambda_curve(probabilities_nk[rows_n], labels_n[rows_n], IS_SEEN, np.zeros(1), NAMES)


def test_harmonic_mean():
  assert metrics.harmonic_mean(0.0, 0.0) == 0
  assert metrics.harmonic_mean(0.5, 0.0) == 0
  np.testing.assert_allclose(metrics.harmonic_mean([0.5, 0.2], [0.5, 0.6]), [0.5, 0.3])


def test_restricted_predictions_know_no_other_class():
  scores_nk = np.array([[0.9, 0.0, 0.02, 0.08], [0.0, 0.9, 0.06, 0.04]])
  assert metrics.restricted_predictions(scores_nk, (2, 3)).tolist() == [3, 2]


def test_calibration_is_subtracted_from_seen_probabilities():
  probabilities_nk = np.array([[0.55, 0.05, 0.3, 0.1]])
  assert metrics.calibrated_predictions(probabilities_nk, IS_SEEN, 0.2).tolist() == [0]
  assert metrics.calibrated_predictions(probabilities_nk, IS_SEEN, 0.3).tolist() == [2]


@pytest.mark.parametrize("is_seen_k", [IS_SEEN, ~IS_SEEN, np.array([False, True, False, True])])
def test_curve_is_that_of_the_predictions(is_seen_k):
  probabilities_nk, labels_n = random_task()
  probabilities_nk[:40] = np.round(probabilities_nk[:40] * 10) / 10  # ties
  lambda_l = np.linspace(0, 1, 21)
  curve = metrics.lambda_curve(probabilities_nk, labels_n, is_seen_k, lambda_l, NAMES)
  for row, lam in enumerate(lambda_l):
    predictions_n = metrics.calibrated_predictions(probabilities_nk, is_seen_k, lam)
    unseen, seen = (metrics.per_class_accuracy(predictions_n, labels_n, np.flatnonzero(mask), NAMES)
                    for mask in (~is_seen_k, is_seen_k))
    assert (curve.unseen_l[row], curve.seen_l[row]) == (unseen, seen)
    assert curve.harmonic_l[row] == metrics.harmonic_mean(unseen, seen)
  assert curve.seen_l[-1] == 0  # no probability exceeds 1


def test_chosen_lambda_is_the_smallest_of_the_best():
  curve = metrics.Curve(np.array([0.0, 0.3, 0.6]), np.zeros(3), np.zeros(3), np.array([0.1, 0.5, 0.5]))
  assert metrics.choose_lambda(curve) == 0.3


def test_gap_closed():
  assert metrics.gap_closed(60, 50, 90) == 0.25
  assert metrics.gap_closed(40, 50, 90) == -0.25
  assert metrics.gap_closed(60, 50, 50) is None
  assert metrics.gap_closed(60, 50, 45) is None
