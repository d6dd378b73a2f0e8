"""Accuracies of zero-shot recognition, as fractions of 1.

The protocol is that of Xian et al. (arXiv 1707.00600): top-1 accuracy of each class, then the mean over
classes; U, S and their harmonic mean H when all classes compete. Calibrated stacking after Chao et al.
(arXiv 1605.04253) in the form of DIG-ZSL (arXiv 2412.17219): lambda is subtracted after the softmax.

Shapes: n image, k class, l value of lambda. Labels and predictions are positions in the k columns.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def softmax(logits_nk: ArrayLike) -> np.ndarray:
  """In float64, where a class far below the best one is not yet 0 and ties with no other."""
  powers_nk = np.exp((logits_nk := np.asarray(logits_nk, np.float64)) - logits_nk.max(-1, keepdims=True))
  return powers_nk / powers_nk.sum(-1, keepdims=True)


def class_accuracies(predictions_n: np.ndarray, labels_n: np.ndarray, classes: Collection[int],
                     names_k: Sequence[str]) -> np.ndarray:
  """Accuracy of each of `classes`, in their order; images of other classes are left out.

  Raises:
    ValueError: a class without test images; the message names it.
  """
  right = np.asarray(predictions_n) == labels_n
  return _class_means(right[None], labels_n, classes, names_k)[0]


def per_class_accuracy(predictions_n: np.ndarray, labels_n: np.ndarray, classes: Collection[int],
                       names_k: Sequence[str]) -> float:
  """Mean over `classes` of the accuracy of each; arguments and errors as in `class_accuracies`."""
  return float(class_accuracies(predictions_n, labels_n, classes, names_k).mean())


def per_image_accuracy(predictions_n: np.ndarray, labels_n: np.ndarray) -> float:
  """Share of images with the right class.

  Raises:
    ValueError: there are no images.
  """
  if not len(labels_n):
    raise ValueError("accuracy of no images is not defined; the test set is empty")
  return float(np.mean(np.asarray(predictions_n) == labels_n))


def harmonic_mean(unseen, seen):
  """`H = 2 U S / (U + S)`, elementwise; 0 where both are 0."""
  unseen, seen = np.asarray(unseen, float), np.asarray(seen, float)
  total = unseen + seen
  return np.where(total > 0, 2 * unseen * seen / np.where(total > 0, total, 1), 0.0)[()]


def restricted_predictions(scores_nk: np.ndarray, classes: Sequence[int]) -> np.ndarray:
  """`argmax` over the columns `classes` alone: the label space of conventional zero-shot learning."""
  return np.asarray(classes)[np.argmax(np.asarray(scores_nk)[:, list(classes)], axis=1)]


def calibrated_predictions(probabilities_nk: np.ndarray, is_seen_k: np.ndarray, lam: float) -> np.ndarray:
  """`argmax_k(o_k - lambda [k is seen])` (arXiv 2412.17219, calibrated inference)."""
  return np.argmax(np.asarray(probabilities_nk, np.float64) - lam * np.asarray(is_seen_k), axis=1)


class Curve(NamedTuple):
  """Generalised zero-shot accuracies for each calibration."""

  lambda_l: np.ndarray
  unseen_l: np.ndarray
  seen_l: np.ndarray
  harmonic_l: np.ndarray


def lambda_curve(probabilities_nk: np.ndarray, labels_n: np.ndarray, is_seen_k: np.ndarray,
                 lambda_l: np.ndarray, names_k: Sequence[str]) -> Curve:
  """U, S and H of `calibrated_predictions` for every lambda.

  A lambda shifts all seen classes alike, so of each image only the best seen and the best unseen class
  matter: two `argmax` serve all lambdas.

  Args:
    probabilities_nk: softmax over all classes, of seen and unseen test images.
    is_seen_k: which columns are seen classes.

  Raises:
    ValueError: a class without test images.
  """
  scores_nk, is_seen_k = np.asarray(probabilities_nk, np.float64), np.asarray(is_seen_k, bool)
  seen, unseen = np.flatnonzero(is_seen_k), np.flatnonzero(~is_seen_k)
  best_seen_n, best_unseen_n = (restricted_predictions(scores_nk, columns) for columns in (seen, unseen))
  rows_n = np.arange(len(scores_nk))
  shifted_ln = scores_nk[rows_n, best_seen_n] - np.asarray(lambda_l, np.float64)[:, None]
  rival_n = scores_nk[rows_n, best_unseen_n]
  is_seen_ln = (shifted_ln > rival_n) | (shifted_ln == rival_n) & (best_seen_n < best_unseen_n)  # as argmax
  right_ln = np.where(is_seen_ln, best_seen_n == labels_n, best_unseen_n == labels_n)
  unseen_l, seen_l = (_class_means(right_ln, labels_n, columns, names_k).mean(1)
                      for columns in (unseen, seen))
  return Curve(np.asarray(lambda_l), unseen_l, seen_l, harmonic_mean(unseen_l, seen_l))


def choose_lambda(curve: Curve) -> float:
  """The lambda of the highest H; of equals the smallest."""
  return float(curve.lambda_l[np.argmax(curve.harmonic_l)])


def gap_closed(learnt: float, plain: float, real: float) -> float | None:
  """`(learnt - plain) / (real - plain)`: how much of the way to real images; None without such a way."""
  return (learnt - plain) / (real - plain) if real > plain else None


def _class_means(right_ln: np.ndarray, labels_n: np.ndarray, classes: Collection[int],
                 names_k: Sequence[str]) -> np.ndarray:
  """Share of right images of each class, `[l, k]`."""
  member_nk = np.asarray(labels_n)[:, None] == np.asarray(list(classes))
  count_k = member_nk.sum(0)
  if not count_k.all():
    missing = [names_k[label] for label, count in zip(classes, count_k) if not count]
    raise ValueError(f"no test images of {', '.join(missing)}: accuracy per class is not defined without "
                     "them; give every class test images or take it from the list")
  return right_ln.astype(float) @ member_nk / count_k
