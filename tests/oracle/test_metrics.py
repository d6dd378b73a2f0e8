"""Metrics against scikit-learn on random predictions."""

import numpy as np
import pytest

sklearn_metrics = pytest.importorskip("sklearn.metrics")

from digzsl_jax import metrics

NAMES = tuple("abcdefg")


@pytest.fixture(params=range(3))
def task(request):
  rng = np.random.default_rng(request.param)
  labels_n = np.concatenate([np.arange(7), rng.choice(7, 300, p=np.arange(1, 8) / 28)])
  probabilities_nk = rng.dirichlet(np.ones(7), len(labels_n))
  probabilities_nk[np.arange(len(labels_n)), labels_n] += 0.2
  return probabilities_nk, labels_n


def test_per_class_accuracy_is_balanced_accuracy(task):
  probabilities_nk, labels_n = task
  said_n = probabilities_nk.argmax(1)
  ours = metrics.per_class_accuracy(said_n, labels_n, range(7), NAMES)
  assert ours == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels_n, said_n), abs=1e-12)
  recall_k = sklearn_metrics.recall_score(labels_n, said_n, average=None)
  ours_k = metrics.class_accuracies(said_n, labels_n, range(7), NAMES)
  np.testing.assert_allclose(ours_k, recall_k, atol=1e-12)
  assert metrics.per_image_accuracy(said_n, labels_n) == sklearn_metrics.accuracy_score(labels_n, said_n)


def test_unseen_accuracy_is_macro_recall_over_unseen_labels(task):
  probabilities_nk, labels_n = task
  is_seen_k = np.arange(7) < 4
  curve = metrics.lambda_curve(probabilities_nk, labels_n, is_seen_k, np.array([0.0, 0.15, 0.9]), NAMES)
  for lam, unseen, seen, harmonic in zip(*curve):
    said_n = (probabilities_nk - lam * is_seen_k).argmax(1)
    recall = [sklearn_metrics.recall_score(labels_n, said_n, labels=classes, average="macro", zero_division=0)
              for classes in (range(4, 7), range(4))]
    assert (unseen, seen) == pytest.approx(recall, abs=1e-12)
    assert harmonic == pytest.approx(2 * np.prod(recall) / sum(recall), abs=1e-12)


def test_conventional_accuracy_is_balanced_accuracy_of_the_unseen_block(task):
  probabilities_nk, labels_n = task
  rows_n = labels_n >= 4
  said_n = metrics.restricted_predictions(probabilities_nk[rows_n], range(4, 7))
  theirs_n = 4 + probabilities_nk[rows_n, 4:].argmax(1)
  theirs = sklearn_metrics.balanced_accuracy_score(labels_n[rows_n], theirs_n)
  ours = metrics.per_class_accuracy(said_n, labels_n[rows_n], range(4, 7), NAMES)
  assert ours == pytest.approx(theirs, abs=1e-12)
