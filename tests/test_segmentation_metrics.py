"""Intersection over union against scikit-learn's Jaccard index."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from digzsl_jax import segmentation_metrics as metrics


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_iou_is_that_of_scikit_learn(dtype):
  rng = np.random.default_rng(0)
  true = rng.integers(-2, 27, (40, 50))
  true[true == 5] = 6  # class 5 is predicted alone, 7 is true alone, 8 is nowhere
  true[true == 8] = 9
  predicted = np.where(rng.random(true.shape) < 0.6, true.clip(0), rng.integers(0, 27, true.shape))
  predicted[np.isin(predicted, (7, 8))] = 10
  judged = true >= 0
  predicted[~judged] = 99
  found_cc = sum(metrics.confusion(predicted[rows].astype(dtype), true[rows], 27)
                 for rows in (slice(0, 11), slice(11, 40)))
  assert found_cc.dtype == np.int64
  np.testing.assert_array_equal(found_cc, confusion_matrix(true[judged], predicted[judged], labels=range(27)))
  mean, iou_c = metrics.mean_iou(found_cc)
  expected_c = jaccard_score(true[judged], predicted[judged], labels=range(27), average=None, zero_division=0)
  assert np.flatnonzero(np.isnan(iou_c)).tolist() == [8] and iou_c[5] == iou_c[7] == 0
  np.testing.assert_allclose(np.nan_to_num(iou_c), expected_c, rtol=1e-12)
  assert mean == pytest.approx(np.delete(expected_c, 8).mean(), rel=1e-12)


def test_small_integers_do_not_overflow():
  high = np.full((2, 3), 170, np.uint8)
  found_cc = metrics.confusion(high, high.astype(np.int16), 171)
  assert found_cc[170, 170] == found_cc.sum() == 6 and metrics.mean_iou(found_cc)[0] == 1


@pytest.mark.parametrize("predicted, true, message", [
  ([[0, 1]], [[0], [1]], r"the prediction is \[1, 2\], but the truth \[2, 1\]"),
  ([[0, 3]], [[0, 1]], "the prediction goes from 0 to 3; 3 classes go from 0 to 2"),
  ([[0, -1]], [[0, 1]], "the prediction goes from -1 to 0"),
  ([[0, 1]], [[0, 3]], "the truth goes from 0 to 3"),
])
def test_what_does_not_fit_is_named(predicted, true, message):
  with pytest.raises(ValueError, match=message):
    metrics.confusion(np.array(predicted), np.array(true), 3)


def test_nothing_judged_has_no_mean():
  found_cc = metrics.confusion(np.zeros((2, 2), int), np.full((2, 2), -1), 3)
  with pytest.raises(ValueError, match="none was judged"):
    metrics.mean_iou(found_cc)
