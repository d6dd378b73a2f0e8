"""Metrics of several labels against scikit-learn."""

import numpy as np
import pytest

sklearn_metrics = pytest.importorskip("sklearn.metrics")

from digzsl_jax import multilabel_metrics as metrics


@pytest.fixture
def task():
  rng = np.random.default_rng(0)
  targets_nk = (rng.random((500, 20)) < np.linspace(0.02, 0.6, 20)).astype(np.int8)
  return (rng.normal(size=targets_nk.shape) + targets_nk).astype(np.float32), targets_nk


def test_average_precision(task):
  scores_nk, targets_nk = task
  assert all(len(np.unique(column)) == len(column) for column in scores_nk.T)  # they treat equal scores differently
  theirs_k = sklearn_metrics.average_precision_score(targets_nk, scores_nk, average=None)
  ours_k = metrics.average_precisions(scores_nk, targets_nk)
  np.testing.assert_allclose(ours_k, theirs_k, rtol=1e-12)
  macro = sklearn_metrics.average_precision_score(targets_nk, scores_nk, average="macro")
  assert metrics.mean_average_precision(ours_k) == pytest.approx(macro, rel=1e-12)


@pytest.mark.parametrize("top", [3, 5])
def test_precision_recall_and_f1_of_the_top_classes(task, top):
  scores_nk, targets_nk = task
  tags_nk = np.zeros(scores_nk.shape, int)
  np.put_along_axis(tags_nk, np.argsort(-scores_nk, axis=1)[:, :top], 1, axis=1)
  theirs = sklearn_metrics.precision_recall_fscore_support(targets_nk, tags_nk, average="micro")[:3]
  assert metrics.precision_recall_f1(scores_nk, targets_nk, top) == pytest.approx(theirs, rel=1e-12)


def test_equal_scores_share_a_rank_there():
  """What the module says of scikit-learn."""
  scores_n, targets_n = np.array([0.9, 0.5, 0.5, 0.5]), np.array([1, 0, 1, 0])
  assert sklearn_metrics.average_precision_score(targets_n, scores_n) == pytest.approx((1 + 2 / 4) / 2)
  assert metrics.average_precisions(scores_n[:, None], targets_n[:, None])[0] == pytest.approx((1 + 2 / 3) / 2)
