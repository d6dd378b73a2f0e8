"""TagCLIP (arXiv 2312.12828): tags of a picture by a frozen CLIP, from its patches to the whole.

Scores of patches (`coarse_scores`) are refined by the model's own attention (`refine`, DMAR in the paper), the best
patches of a label give its score and a region (`propose`), regions are looked at again as pictures of their own
(`reidentify`, CWR), and scores become tags (`tags`). All are pure functions of fixed shapes, so a batch is two compiled
calls: between them the host lists the candidates, whose number depends on the pictures.

Pictures of a batch are padded at the bottom and on the right to a common size; `grids_b2` says how many rows and
columns of patches each really has, and the rest counts in no softmax, mean, minimum or maximum.

`compat=True` does as the released code (github.com/linyq2117/TagCLIP) where that looks like an oversight:

  boxes      leave out the last row and column of the patches, even where the scores are highest
  no box     a candidate whose box this empties ends the second look, for all later labels too
  level map  scores of a label that are all equal have no region (there the released code divides by zero)

Otherwise boxes reach the edge, and the region of a level map is the picture. In all else the two agree.

Shapes: b picture, n candidate, i j height and width of a batch in pixels or patches, r s those of a crop, l m positions
(patches row by row), d width, p width of the shared space, c colours, k classes: labels, then background, f the labels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax.models import attention as heads
from digzsl_jax.models import clip

OUTSIDE = -1000.0  # added to the class position's logits at patches of a crop that are not of the region


class Proposals(NamedTuple):
  """What a second look starts from.

  Attributes:
    scores_bf: the label's best patch.
    candidates_bf: whether the label is looked at again.
    masks_bijf: its region.
    boxes_bf4: top, left, bottom and right of the region in patches, the last two exclusive.
  """

  scores_bf: jax.Array
  candidates_bf: jax.Array
  masks_bijf: jax.Array
  boxes_bf4: jax.Array


def grid(height: int, width: int, patch: int) -> tuple[int, int]:
  """Rows and columns of patches of a picture: it is resized (bicubic) up to whole ones."""
  return -(-height // patch), -(-width // patch)


def coarse_scores(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array,
                  text_kp: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
  """Class probabilities of every patch, without the last layer's self-attention.

  There a patch keeps its own values, as if it attended to itself alone (the released code adds -100 to the logits of
  all others). Residual and feed-forward stay.

  Args:
    images_bijc: normalised, of whole patches, padded with anything finite.
    grids_b2: rows and columns of patches of each picture.
    text_kp: embeddings of labels and background, of length 1.

  Returns:
    `(scores_bijk, attention)`, the second as of `features`.

  Raises:
    ValueError: sides of `images_bijc` that are no whole patches.
  """
  attention = []
  take = lambda weights_blm, _: attention.append(weights_blm)
  return _coarse_scores(model, images_bijc, grids_b2, text_kp, take), attention


def features(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
  """The vision tower up to its last layer.

  Args:
    images_bijc: as of `coarse_scores`, as is `grids_b2`.

  Returns:
    `(hidden_bld, attention)`: what enters the last layer, the class position first, and the mean over heads from patch
    to patch, `[b, l, m]` of every layer, the last too; rows are short of 1 by what goes to the class position.

  Raises:
    ValueError: sides of `images_bijc` that are no whole patches.
  """
  attention = []
  hidden_bld, _ = each_layer(model, images_bijc, grids_b2, lambda weights_blm, _: attention.append(weights_blm))
  return hidden_bld, attention


def scores_and_affinity(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array, text_kp: jax.Array, *,
                        first_layer: int = 8, votes: int = 4) -> tuple[jax.Array, jax.Array]:
  """`coarse_scores` and the `affinity` of its attention, which is used up layer by layer.

  Of what has `l * m` numbers a picture there are at most five at a time, whatever the number of layers and heads: a
  layer's mean over heads, one or two on the way to it, the average and the votes so far.
  """
  gather = _Affinity(grids_b2, len(model.vision_model.encoder.layers), first_layer, votes)
  return _coarse_scores(model, images_bijc, grids_b2, text_kp, gather.add), gather.result()


def _coarse_scores(model, images_bijc, grids_b2, text_kp, take) -> jax.Array:
  """The scores of `coarse_scores`; `take` as of `each_layer`."""
  hidden_bld, values_bld = each_layer(model, images_bijc, grids_b2, take)
  scores_blk = _probabilities(model, patch_embeds(model, hidden_bld, values_bld), text_kp)
  patch = model.vision_model.embeddings.patch_size
  rows, columns = (side // patch for side in images_bijc.shape[1:3])
  return scores_blk.reshape(len(scores_blk), rows, columns, -1)


def each_layer(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array,
               take: Callable[[jax.Array, jax.Array], None]) -> tuple[jax.Array, jax.Array]:
  """`features` that gives the attention of one layer after another away.

  Args:
    take: is called with a layer's `weights_blm` and with the picture's own patches, `inside_bij`.

  Returns:
    `(hidden_bld, values_bld)`: what enters the last layer, and its values.
  """
  tower = model.vision_model
  _, height, width, _ = images_bijc.shape
  patch = tower.embeddings.patch_size
  if height % patch or width % patch:
    raise ValueError(f"images of {height}x{width} pixels are no whole patches of {patch}: resize them")
  rows, columns = height // patch, width // patch
  x_bld = tower.pre_layrnorm(tower.embeddings(images_bijc, positions(tower.embeddings, grids_b2, rows, columns)))
  inside_bij, bias_bm = inside(grids_b2, rows, columns), bias(grids_b2, rows, columns)
  for layer in tower.encoder.layers:
    before_bld, own = x_bld, layer.self_attn
    q_blhd, k_blhd, v_blhd = own.project(layer.layer_norm1(x_bld))
    attended_blhd, weights_blm = heads.with_mean(q_blhd, k_blhd, v_blhd, bias_bm)
    take(weights_blm[:, 1:, 1:], inside_bij)
    x_bld = layer.feed_forward(before_bld + own.out_proj(attended_blhd.reshape(x_bld.shape)))
  return before_bld, v_blhd.reshape(x_bld.shape)


def patch_embeds(model: clip.CLIPModel, before_bld: jax.Array, values_bld: jax.Array) -> jax.Array:
  """Embeddings `[b, l, p]`, of any norm, of the patches, out of the last layer's input and values."""
  tower, last = model.vision_model, model.vision_model.encoder.layers[-1]
  x_bld = last.feed_forward(before_bld + last.self_attn.out_proj(values_bld))
  return model.visual_projection(tower.post_layernorm(x_bld[:, 1:]))


def bias(grids_b2: jax.Array, rows: int, columns: int) -> jax.Array:
  """What keeps attention out of the padding, `[b, m]`, the class position first: 0, or -inf in the padding."""
  inside_bl = inside(grids_b2, rows, columns).reshape(len(grids_b2), -1)
  return jnp.where(jnp.pad(inside_bl, ((0, 0), (1, 0)), constant_values=True), 0, -jnp.inf)


def positions(embeddings: clip.VisionEmbeddings, grids_b2: jax.Array, rows: int, columns: int) -> jax.Array:
  """Position embeddings `[b, l, d]` of pictures of any size in a batch of `rows` times `columns` patches.

  Those of the model, interpolated bilinearly without antialias (PyTorch's `align_corners=False`) and rounded to half
  precision; a picture of the model's own size has them as they are. Both as in the released code.
  """
  table_ld = embeddings.position_embedding.embedding[...].astype(jnp.float32)
  side = embeddings.image_size // embeddings.patch_size
  own_rsd = table_ld[1:].reshape(side, side, -1)
  down_bir, across_bjs = (_bilinear(jnp.zeros_like(sizes_b), jnp.full_like(sizes_b, side), side, sizes_b, most)
                          for sizes_b, most in zip(grids_b2.T, (rows, columns)))
  grid_bijd = _half(jnp.einsum("bir,bjs,rsd->bijd", down_bir, across_bjs, own_rsd, precision="highest"))
  kept_ijd = jnp.pad(own_rsd, ((0, max(rows - side, 0)), (0, max(columns - side, 0)), (0, 0)))[:rows, :columns]
  grid_bijd = jnp.where((grids_b2 == side).all(1)[:, None, None, None], kept_ijd, grid_bijd)
  b, width = len(grids_b2), table_ld.shape[1]
  class_b1d = jnp.broadcast_to(table_ld[:1], (b, 1, width))
  return jnp.concatenate([class_b1d, grid_bijd.reshape(b, -1, width)], axis=1).astype(embeddings.dtype)


def refine(scores_bijk: jax.Array, attention: Sequence[jax.Array], grids_b2: jax.Array, *, first_layer: int = 8,
           votes: int = 4, compat: bool = False) -> jax.Array:
  """Dual-masking attention refinement: scores spread by attention, that of few layers and of weak patches left out.

  Args:
    scores_bijk: of `coarse_scores`, as is `attention`.
    first_layer: the layers from here to the last but one are averaged: published 8 of 12, for COCO-Stuff 0.
    votes: so many of all layers, the last too, must give a weight above their mean for it to count: published 4 of 12.

  Returns:
    `[b, i, j, k]`, no probabilities any more; 0 in the padding.

  Raises:
    ValueError: too few layers for `first_layer` or `votes`.
  """
  gather = _Affinity(grids_b2, len(attention), first_layer, votes)
  for weights_blm in attention:
    gather.add(weights_blm, inside(grids_b2, *scores_bijk.shape[1:3]))
  return spread(scores_bijk, gather.result(), grids_b2, compat=compat)


class _Affinity:
  """From patch to patch: the mean attention of some layers where it is above its mean in enough of all layers."""

  def __init__(self, grids_b2: jax.Array, layers: int, first_layer: int, votes: int):
    check(layers, first_layer, votes)
    self.averaged, self.votes, self.layer = range(first_layer, layers - 1), votes, 0
    self.pairs_b11 = (grids_b2.prod(1)**2)[:, None, None]
    self.above_blm, self.sum_blm = 0, 0

  def add(self, weights_blm: jax.Array, inside_bij: jax.Array) -> None:
    """The next layer."""
    inside_bl1 = inside_bij.reshape(len(inside_bij), -1, 1)
    mean_b11 = weights_blm.sum((1, 2), keepdims=True, where=inside_bl1) / self.pairs_b11
    # A weight towards the padding is 0, which is never above the mean.
    self.above_blm += (weights_blm > mean_b11).astype(jnp.int32)
    if self.layer in self.averaged:
      self.sum_blm += weights_blm
    self.layer += 1

  def result(self) -> jax.Array:
    return self.sum_blm / len(self.averaged) * (self.above_blm >= self.votes)


def check(layers: int, first_layer: int, votes: int) -> None:
  """Raises ValueError if a model of so many layers has too few for `refine`."""
  if not (0 <= first_layer < layers - 1 and 1 <= votes <= layers):
    raise ValueError(f"first_layer {first_layer} and votes {votes} do not fit a model of {layers} layers")


def spread(scores_bijk: jax.Array, affinity_blm: jax.Array, grids_b2: jax.Array, *, compat: bool = False) -> jax.Array:
  """The second half of `refine`, from the affinity of patches."""
  b, rows, columns, k = scores_bijk.shape
  inside_bij1 = inside(grids_b2, rows, columns)[..., None]

  def once(source_bijk):
    out_blk = jnp.einsum("blm,bmk->blk", affinity_blm, source_bijk.reshape(b, -1, k), precision="highest")
    return jnp.where(inside_bij1, out_blk.reshape(scores_bijk.shape), 0)

  relative_bijk, level_b11k = relative(once(scores_bijk), inside_bij1)
  mean_b11k = relative_bijk.sum((1, 2), keepdims=True) / grids_b2.prod(1)[:, None, None, None]
  strong_bijk = jnp.floor(relative_bijk * 255) > mean_b11k * 255  # of bytes, as the released code has it
  boxed_bijk = boxed(strong_bijk)
  if compat:
    boxed_bijk &= inside(grids_b2 - 1, rows, columns)[..., None]
  else:
    boxed_bijk |= level_b11k
  return once(jnp.where(boxed_bijk, scores_bijk, 0))


def best_patch(scores_bijk: jax.Array, grids_b2: jax.Array) -> jax.Array:
  """The highest score of each class among the picture's patches, `[b, k]`, none below 0."""
  return scores_bijk.max((1, 2), where=inside(grids_b2, *scores_bijk.shape[1:3])[..., None], initial=0)


def boxed(mask_bijk: jax.Array) -> jax.Array:
  """Union of the bounding boxes of the connected parts (8 neighbours) of each mask.

  A connected part has a pixel in every row of its box, so the union needs to know of each pixel how far its part
  reaches to the left and right, and no more. That spreads from neighbour to neighbour until nothing changes.
  """
  columns = mask_bijk.shape[2]
  column_j1 = jnp.arange(columns, dtype=jnp.int16)[:, None]  # half the time of int32
  none = -columns  # less than any part reaches
  reach_2bijk = jnp.where(mask_bijk, jnp.stack([-column_j1, column_j1])[:, None, None], none)

  def widen(state):
    reach, _ = state
    wider = reach
    for axis in (2, 3):
      size = reach.shape[axis]
      pads = [(int(a == axis),) * 2 for a in range(reach.ndim)]
      padded = jnp.pad(wider, pads, constant_values=none)
      shifted = (jax.lax.slice_in_dim(padded, first, first + size, axis=axis) for first in (0, 2))
      wider = jnp.maximum(wider, jnp.maximum(*shifted))
    wider = jnp.where(mask_bijk, wider, none)
    return wider, jnp.any(wider != reach)

  (minus_left_bijk, right_bijk), _ = jax.lax.while_loop(lambda state: state[1], widen, (reach_2bijk, mask_bijk.any()))
  from_left_bijk = jax.lax.cummax(right_bijk, axis=2) >= column_j1
  from_right_bijk = jax.lax.cummax(minus_left_bijk, axis=2, reverse=True) >= -column_j1
  return from_left_bijk | from_right_bijk


def propose(refined_bijk: jax.Array, grids_b2: jax.Array, labels: int, *, threshold: float = 0.5,
            compat: bool = False) -> Proposals:
  """Scores of the labels, and which of them deserve a second look at which part of the picture.

  A candidate's score is above `min + threshold (max - min)` of the patches of all classes, background too; its region
  is where its own patches are above half of their range.

  Args:
    refined_bijk: of `refine`.
    labels: so many of the classes, the first ones, are no background.
    threshold: published 0.5, for COCO-Stuff 0.1.
  """
  inside_bij1 = inside(grids_b2, *refined_bijk.shape[1:3])[..., None]
  labels_bijf = refined_bijk[..., :labels]
  scores_bf = best_patch(labels_bijf, grids_b2)
  low_b = refined_bijk.min((1, 2, 3), where=inside_bij1, initial=jnp.inf)
  high_b = refined_bijk.max((1, 2, 3), where=inside_bij1, initial=0)
  candidates_bf = scores_bf > (low_b + threshold * (high_b - low_b))[:, None]
  relative_bijf, level_b11f = relative(labels_bijf, inside_bij1)
  masks_bijf = relative_bijf > 0.5
  if not compat:
    masks_bijf |= level_b11f & inside_bij1
  ends = []
  for across, size_b in ((2, grids_b2[:, 0]), (1, grids_b2[:, 1])):
    filled_blf = masks_bijf.any(across)
    first_bf, from_end_bf = filled_blf.argmax(1), filled_blf[:, ::-1].argmax(1)
    end_bf = jnp.where(filled_blf.any(1), filled_blf.shape[1] - from_end_bf, 0)
    ends.append((first_bf, jnp.minimum(end_bf, size_b[:, None] - 1) if compat else end_bf))
  (top_bf, bottom_bf), (left_bf, right_bf) = ends
  if compat:
    empty_bf = candidates_bf & ((top_bf == bottom_bf) | (left_bf == right_bf))
    candidates_bf &= jnp.cumsum(empty_bf, axis=1) == 0
  return Proposals(scores_bf, candidates_bf, masks_bijf, jnp.stack([top_bf, left_bf, bottom_bf, right_bf], axis=-1))


def reidentify(model: clip.CLIPModel, images_bijc: jax.Array, proposals: Proposals, picture_n: jax.Array,
               label_n: jax.Array, text_kp: jax.Array) -> jax.Array:
  """Class-wise re-identification: probabilities `[n]` of candidates, each from its box alone.

  The box is resized bilinearly to the model's size. Its class position attends to patches of the region only; pixels
  and other positions are left as they are. A candidate's new score is the mean of the old one and this.

  Args:
    images_bijc: of `coarse_scores`, as is `text_kp`.
    picture_n: which pictures, rows of the batch.
    label_n: which labels of these; `(picture_n, label_n)` are places of `proposals.candidates_bf`.
  """
  places = picture_n, label_n
  masks_nij = jnp.moveaxis(proposals.masks_bijf, -1, 1)[places]
  return look(model, images_bijc[picture_n], masks_nij, proposals.boxes_bf4[places], label_n, text_kp)


def look(model: clip.CLIPModel, images_nijc: jax.Array, masks_nij: jax.Array, boxes_n4: jax.Array, label_n: jax.Array,
         text_kp: jax.Array) -> jax.Array:
  """`reidentify` with each candidate's own picture, region and box."""
  tower = model.vision_model
  size, patch = tower.image_size, tower.embeddings.patch_size
  top_n, left_n, bottom_n, right_n = boxes_n4.T
  starts, lengths = (top_n, left_n), (bottom_n - top_n, right_n - left_n)
  down_nri, across_nsj = (_bilinear(start_n * patch, length_n * patch, pixels, jnp.full_like(length_n, size), size)
                          for start_n, length_n, pixels in zip(starts, lengths, images_nijc.shape[1:3]))
  crops_nrsc = jnp.einsum("nri,nsj,nijc->nrsc", down_nri, across_nsj, images_nijc, precision="highest")

  side = size // patch
  row_nr, column_ns = (start_n[:, None] + _nearest(most, side)[length_n]
                       for start_n, length_n, most in zip(starts, lengths, masks_nij.shape[1:3]))
  masks_nrs = masks_nij[jnp.arange(len(label_n))[:, None, None], row_nr[:, :, None], column_ns[:, None]]
  seen_nm = jnp.pad(masks_nrs.reshape(len(label_n), -1), ((0, 0), (1, 0)), constant_values=True)
  x_nld = tower.pre_layrnorm(tower.embeddings(crops_nrsc))
  others = heads.by_heads if jax.default_backend() == "cpu" else heads.whole  # queries of the patches
  for layer in tower.encoder.layers:
    q_nlhd, k_nlhd, v_nlhd = layer.self_attn.project(layer.layer_norm1(x_nld))
    class_n1hd, _ = heads.attention(q_nlhd[:, :1], k_nlhd, v_nlhd, jnp.where(seen_nm, 0, OUTSIDE)[:, None, None])
    attended_nlhd = jnp.concatenate([class_n1hd, others(q_nlhd[:, 1:], k_nlhd, v_nlhd)], axis=1)
    before_nld, own = x_nld, layer.self_attn
    x_nld = layer.feed_forward(before_nld + own.out_proj(attended_nlhd.reshape(x_nld.shape)))
  # Of the last layer the class position alone: the compiler drops the others.
  x_n1d = layer.feed_forward(before_nld[:, :1] + own.out_proj(class_n1hd.reshape(len(x_nld), 1, -1)))
  embeds_np = model.visual_projection(tower.post_layernorm(x_n1d[:, 0]))
  return _probabilities(model, embeds_np, text_kp)[jnp.arange(len(label_n)), label_n]


def tags(scores_bf: jax.Array, threshold: float = 0.5) -> jax.Array:
  """Whether a label is said of a picture: its score is above `min + threshold (max - min)` of all labels.

  Where none is, because all are equal, the first one is.

  Args:
    scores_bf: of the labels alone.
    threshold: published 0.5, for COCO-Stuff 0.1.
  """
  low_b1, high_b1 = scores_bf.min(1, keepdims=True), scores_bf.max(1, keepdims=True)
  above_bf = scores_bf > low_b1 + threshold * (high_b1 - low_b1)
  best_bf = jnp.arange(scores_bf.shape[1]) == scores_bf.argmax(1)[:, None]
  return above_bf | ~above_bf.any(1, keepdims=True) & best_bf


def inside(grids_b2: jax.Array, rows: int, columns: int) -> jax.Array:
  """Which patches of the batch are of the picture, `[b, i, j]`."""
  return (jnp.arange(rows)[:, None] < grids_b2[:, :1, None]) & (jnp.arange(columns) < grids_b2[:, 1:, None])


def logits(model: clip.CLIPModel, embeds: jax.Array, text_kp: jax.Array) -> jax.Array:
  """The scaled cosine of embeddings, `[..., p]`, and classes, `[..., k]`, float32."""
  embeds = embeds.astype(jnp.float32)
  embeds /= jnp.linalg.norm(embeds, axis=-1, keepdims=True)
  cosines = jnp.einsum("...p,kp->...k", embeds, text_kp.astype(jnp.float32), precision="highest")
  return jnp.exp(model.logit_scale[...].astype(jnp.float32)) * cosines


def _probabilities(model: clip.CLIPModel, embeds: jax.Array, text_kp: jax.Array) -> jax.Array:
  """Softmax over the classes."""
  return jax.nn.softmax(logits(model, embeds, text_kp), axis=-1)


def _bilinear(start_n: jax.Array, length_n: jax.Array, inputs: int, outputs_n: jax.Array, most: int) -> jax.Array:
  """Weights `[n, most, inputs]` that resize `length` of `inputs` pixels, from `start` on, to `outputs`.

  PyTorch's bilinear `interpolate` with `align_corners=False` along one axis: no antialias, the border repeated. What is
  beyond `outputs` repeats the last one.
  """
  ratio_n1 = (length_n / outputs_n)[:, None]
  place_no = jnp.clip((jnp.arange(most) + 0.5) * ratio_n1 - 0.5, 0, (length_n - 1)[:, None])
  return jnp.maximum(1 - jnp.abs(place_no[..., None] - (jnp.arange(inputs) - start_n[:, None])[:, None]), 0)


def _nearest(most: int, outputs: int) -> jax.Array:
  """Which input PyTorch's nearest `interpolate` takes for each output, `[most + 1, outputs]`, by number of inputs.

  A table, because its float32 ratio is now and then just short of a whole place, and XLA divides in other ways.
  """
  ratio_n1 = np.arange(most + 1, dtype=np.float32)[:, None] / np.float32(outputs)
  return jnp.asarray(np.floor(ratio_n1 * np.arange(outputs, dtype=np.float32)).astype(np.int32))


def _half(x: jax.Array) -> jax.Array:
  """`x` rounded to half precision: XLA may drop a conversion to and fro, and `reduce_precision` drops subnormals."""
  subnormal = jnp.round(x * 2.0**24) * 2.0**-24
  return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10))


def relative(scores_bijk: jax.Array, inside_bij1: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores of each class between the lowest and the highest of its picture, 0 to 1, and whether these are equal.

  Of a level class, and in the padding, the scores are 0.
  """
  shifted_bijk = scores_bijk - scores_bijk.min((1, 2), keepdims=True, where=inside_bij1, initial=jnp.inf)
  range_b11k = shifted_bijk.max((1, 2), keepdims=True, where=inside_bij1, initial=0)
  level_b11k = range_b11k == 0
  return jnp.where(inside_bij1 & ~level_b11k, shifted_bijk / jnp.where(level_b11k, 1, range_b11k), 0), level_b11k
