"""Intersection over union of segmentations, as fractions of 1.

Of VOC and COCO the background is a class too, so there are 21 and 81; COCO-Stuff's 27 groups have none. Pixels of
negative truth are not judged. So of true masks with -1 for background and -2 for not judged, VOC's and COCO's go in
with 1 added to both sides, COCO-Stuff's as they are.

Shapes: h w pixel, c class.
"""

import numpy as np


def confusion(predicted_hw: np.ndarray, true_hw: np.ndarray, classes: int) -> np.ndarray:
  """`[c, c]`, int64: how many pixels of a true class (row) are predicted as each (column). Sums over pictures add up.

  Args:
    predicted_hw: classes, 0 to `classes - 1`; anything where the truth is not judged.
    true_hw: the same, negative where it is not judged.
    classes: their number.

  Raises:
    ValueError: different shapes, or a class out of range.
  """
  predicted_hw, true_hw = np.asarray(predicted_hw), np.asarray(true_hw)
  if predicted_hw.shape != true_hw.shape:
    raise ValueError(f"the prediction is {list(predicted_hw.shape)}, but the truth {list(true_hw.shape)}: both are of "
                     "the picture's own size")
  judged_hw = true_hw >= 0
  # int64: small integers would overflow below.
  predicted_p, true_p = predicted_hw[judged_hw].astype(np.int64), true_hw[judged_hw].astype(np.int64)
  for what, found_p in (("prediction", predicted_p), ("truth", true_p)):
    if found_p.size and not 0 <= found_p.min() <= found_p.max() < classes:
      raise ValueError(f"the {what} goes from {found_p.min()} to {found_p.max()}; {classes} classes go from 0 to "
                       f"{classes - 1}")
  return np.bincount(classes * true_p + predicted_p, minlength=classes * classes).reshape(classes, classes)


def mean_iou(confusion_cc: np.ndarray) -> tuple[float, np.ndarray]:
  """`IoU_c = TP / (TP + FP + FN)` over the pixels of all pictures together.

  TagCLIP's published code leaves a class that is predicted but nowhere true out of the mean; here it counts 0.

  Returns:
    the mean of the classes that are somewhere true or predicted; and `[c]`, NaN for the others.

  Raises:
    ValueError: no pixels.
  """
  confusion_cc = np.asarray(confusion_cc)
  if not confusion_cc.any():
    raise ValueError("mean intersection over union of no pixels is not defined: none was judged")
  hits_c = np.diag(confusion_cc)
  union_c = confusion_cc.sum(0) + confusion_cc.sum(1) - hits_c
  iou_c = np.divide(hits_c, union_c, out=np.full(len(hits_c), np.nan), where=union_c > 0)
  return float(np.nanmean(iou_c)), iou_c
