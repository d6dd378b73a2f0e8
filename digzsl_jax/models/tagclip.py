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

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax.models import attention as heads
from digzsl_jax.models import clip, platforms
from digzsl_jax.models.affinity import Affinity
from digzsl_jax.models.clip_patches import bilinear, each_layer, inside, into, logits, patch_embeds

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
    `(scores_bijk, attention)`, the second as of `clip_patches.features`.

  Raises:
    ValueError: sides of `images_bijc` that are no whole patches.
  """
  attention = []
  return _coarse_scores(model, images_bijc, grids_b2, text_kp, into(attention)), attention


def scores_and_affinity(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array, text_kp: jax.Array, *,
                        first_layer: int = 8, votes: int = 4) -> tuple[jax.Array, jax.Array]:
  """`coarse_scores` and the affinity of its attention (`models/affinity.py`), which is used up layer by layer.

  Of what has `l * m` numbers a picture there are at most five at a time, whatever the number of layers and heads: a
  layer's mean over heads, one or two on the way to it, the average and the votes so far.
  """
  rows, columns = grid(*images_bijc.shape[1:3], model.vision_model.embeddings.patch_size)
  gather = Affinity(inside(grids_b2, rows, columns), len(model.vision_model.encoder.layers), first_layer, votes)
  return _coarse_scores(model, images_bijc, grids_b2, text_kp, gather.add), gather.result()


def _coarse_scores(model, images_bijc, grids_b2, text_kp, take) -> jax.Array:
  """The scores of `coarse_scores`; `take` as of `each_layer`."""
  hidden_bld, values_bld = each_layer(model, images_bijc, grids_b2, take)
  scores_blk = _probabilities(model, patch_embeds(model, hidden_bld, values_bld), text_kp)
  patch = model.vision_model.embeddings.patch_size
  rows, columns = (side // patch for side in images_bijc.shape[1:3])
  return scores_blk.reshape(len(scores_blk), rows, columns, -1)


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
  gather = Affinity(inside(grids_b2, *scores_bijk.shape[1:3]), len(attention), first_layer, votes)
  for weights_blm in attention:
    gather.add(weights_blm)
  return spread(scores_bijk, gather.result(), grids_b2, compat=compat)


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
  down_nri, across_nsj = (bilinear(start_n * patch, length_n * patch, pixels, jnp.full_like(length_n, size), size)
                          for start_n, length_n, pixels in zip(starts, lengths, images_nijc.shape[1:3]))
  crops_nrsc = jnp.einsum("nri,nsj,nijc->nrsc", down_nri, across_nsj, images_nijc, precision="highest")

  side = size // patch
  row_nr, column_ns = (start_n[:, None] + _nearest(most, side)[length_n]
                       for start_n, length_n, most in zip(starts, lengths, masks_nij.shape[1:3]))
  masks_nrs = masks_nij[jnp.arange(len(label_n))[:, None, None], row_nr[:, :, None], column_ns[:, None]]
  seen_nm = jnp.pad(masks_nrs.reshape(len(label_n), -1), ((0, 0), (1, 0)), constant_values=True)
  x_nld = tower.pre_layrnorm(tower.embeddings(crops_nrsc))
  others = heads.by_heads if platforms.platform() == "cpu" else heads.whole  # queries of the patches
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


def _probabilities(model: clip.CLIPModel, embeds: jax.Array, text_kp: jax.Array) -> jax.Array:
  """Softmax over the classes."""
  return jax.nn.softmax(logits(model, embeds, text_kp), axis=-1)


def _nearest(most: int, outputs: int) -> jax.Array:
  """Which input PyTorch's nearest `interpolate` takes for each output, `[most + 1, outputs]`, by number of inputs.

  A table, because its float32 ratio is now and then just short of a whole place, and XLA divides in other ways.
  """
  ratio_n1 = np.arange(most + 1, dtype=np.float32)[:, None] / np.float32(outputs)
  return jnp.asarray(np.floor(ratio_n1 * np.arange(outputs, dtype=np.float32)).astype(np.int32))


def relative(scores_bijk: jax.Array, inside_bij1: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores of each class between the lowest and the highest of its picture, 0 to 1, and whether these are equal.

  Of a level class, and in the padding, the scores are 0.
  """
  shifted_bijk = scores_bijk - scores_bijk.min((1, 2), keepdims=True, where=inside_bij1, initial=jnp.inf)
  range_b11k = shifted_bijk.max((1, 2), keepdims=True, where=inside_bij1, initial=0)
  level_b11k = range_b11k == 0
  return jnp.where(inside_bij1 & ~level_b11k, shifted_bijk / jnp.where(level_b11k, 1, range_b11k), 0), level_b11k
