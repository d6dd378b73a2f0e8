"""Average precision and F1 against their definitions, with equal scores and classes that are not judged."""

import numpy as np
import pytest

from digzsl_jax import multilabel_metrics as metrics


def by_definition(scores_n, targets_n):
  """Ranks by hand: higher first, then the earlier image."""
  ranked = sorted((image for image in range(len(scores_n)) if targets_n[image] >= 0),
                  key=lambda image: (-scores_n[image], image))
  precisions, hits = [], 0
  for rank, image in enumerate(ranked, 1):
    if targets_n[image] == 1:
      hits += 1
      precisions.append(hits / rank)
  return np.mean(precisions) if precisions else np.nan


def random_task(images, classes, decimals, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(images, classes)).round(decimals),
          rng.choice([-1, 0, 1], (images, classes), p=[0.2, 0.5, 0.3]).astype(np.int8))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_average_precision_is_that_of_the_definition(decimals, dtype):
  scores_nk, targets_nk = random_task(700, 37, decimals)  # more than one block either way
  scores_nk = scores_nk.astype(dtype)
  want_k = [by_definition(*column) for column in zip(scores_nk.T, targets_nk.T)]
  np.testing.assert_allclose(metrics.average_precisions(scores_nk, targets_nk), want_k, rtol=1e-12)
  np.testing.assert_array_equal(metrics.average_precisions(scores_nk, targets_nk.astype(float)),
                                metrics.average_precisions(np.asfortranarray(scores_nk), targets_nk))


def test_of_equal_scores_the_earlier_image_goes_first():
  scores_nk = np.array([[0.5, 0.0, np.inf], [0.5, -0.0, np.inf], [0.5, 0.0, -np.inf], [0.1, -1.0, -np.inf]])
  targets_nk = np.array([[0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
  np.testing.assert_allclose(metrics.average_precisions(scores_nk, targets_nk), [1 / 3, (1 + 2 / 3) / 2, 1 / 4])


def test_classes_without_positives_count_nothing_or_are_skipped():
  scores_nk, targets_nk = np.array([[0.9] * 4, [0.1] * 4]), np.array([[1, 0, -1, -1], [0, 0, -1, 1]])
  precisions_k = metrics.average_precisions(scores_nk, targets_nk)
  np.testing.assert_array_equal(precisions_k, [1, np.nan, np.nan, 1])
  assert metrics.mean_average_precision(precisions_k) == 0.5
  assert metrics.mean_average_precision(precisions_k, skip_absent=True) == 1


def test_nothing_to_judge():
  precisions_k = metrics.average_precisions(np.zeros((0, 3)), np.zeros((0, 3)))
  assert np.isnan(precisions_k).all() and len(precisions_k) == 3
  assert metrics.mean_average_precision(precisions_k) == 0
  with pytest.raises(ValueError, match="no class has a positive"):
    metrics.mean_average_precision(precisions_k, skip_absent=True)
  with pytest.raises(ValueError, match="there are none"):
    metrics.mean_average_precision([])
  unjudged_nk = np.full((2, 3), -1)
  assert metrics.precision_recall_f1(np.eye(2, 3), unjudged_nk, 1) == (0, 0, 0)
  assert metrics.precision_recall_f1(np.eye(0, 3), np.eye(0, 3), 1) == (0, 0, 0)


def test_precision_recall_and_f1_of_the_top_classes():
  scores_nk = np.array([[0.9, 0.8, 0.1, 0.0], [0.1, 0.2, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]])
  targets_nk = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
  got = metrics.precision_recall_f1(scores_nk, targets_nk, 2)
  assert got == pytest.approx((4 / 6, 4 / 7, 8 / 13))
  targets_nk[0, :2], targets_nk[2, 3] = -1, -1  # two tags and one positive less
  assert metrics.precision_recall_f1(scores_nk, targets_nk, 2) == pytest.approx((3 / 4, 3 / 5, 6 / 9))


@pytest.mark.parametrize("top", [1, 3, 9])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_top_classes_with_equal_scores_are_the_first(decimals, top):
  scores_nk, targets_nk = random_task(600, 9, decimals)
  scores_nk[:5, 2:] = -np.inf
  tags_nk = np.zeros(scores_nk.shape, bool)
  np.put_along_axis(tags_nk, np.argsort(-scores_nk, axis=1, kind="stable")[:, :top], True, axis=1)
  want = metrics.tags_precision_recall_f1(tags_nk, targets_nk)
  assert metrics.precision_recall_f1(scores_nk, targets_nk, top) == want
  judged_nk = targets_nk >= 0
  assert want.precision == (targets_nk[tags_nk & judged_nk] == 1).mean()
  assert want.recall == tags_nk[targets_nk == 1].mean()


def test_bad_input_is_named():
  scores_nk, targets_nk = random_task(4, 3, 2)
  bad_nk = scores_nk.copy()
  bad_nk[2, 1:] = np.nan
  for call in (metrics.average_precisions, lambda *task: metrics.precision_recall_f1(*task, 1)):
    with pytest.raises(ValueError, match=r"column 1 are not a number \(NaN\), as in 2 of 3"):
      call(bad_nk, targets_nk)
    with pytest.raises(ValueError, match=r"\[4, 3\] and targets \[3, 4\]"):
      call(scores_nk, targets_nk.T)
    for odd in (0.5, 2, np.nan, -128):
      wrong_nk = targets_nk.astype(float)
      wrong_nk[0, 0] = odd
      with pytest.raises(ValueError, match="not judged"):
        call(scores_nk, wrong_nk)
  with pytest.raises(ValueError, match=r"\[3\]"):
    metrics.tags_precision_recall_f1([True] * 3, [1] * 3)
  for top in (0, 4):
    with pytest.raises(ValueError, match=f"no top {top} of 3"):
      metrics.precision_recall_f1(scores_nk, targets_nk, top)
