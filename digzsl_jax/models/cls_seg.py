"""CLS-SEG: masks of labels already decided, by a frozen CLIP.

TagCLIP (arXiv 2312.12828) takes CLIP-ES (arXiv 2212.09506) for this: Grad-CAM of each label against the picture's other
labels and a list of background classes (`cams`), then spread by the model's own attention within boxes of what was
found (`affinity`, `refine`). `tagclip.features` gives what both start from. All are pure functions of fixed shapes;
labels are pairs of a picture and a class, whose number depends on the pictures.

Order of the steps as in the released code (github.com/linyq2117/TagCLIP, `CLIP-ES`): the score is the softmax of the
scaled cosine of the mean of the patches, without the class position, after the last norm and before the projection;
CAMs weigh the last layer's first norm. It rounds the model to half precision on a GPU, which is not done here.

`compat=True` does as the released code where that looks like an oversight: boxes leave out the last row and column of
the patches, even where the CAM is highest. Otherwise they reach the edge. In all else the two agree but for rounding:
it adds 1e-7 to what it divides by, so CAMs that small turn out empty there.

Pictures of a batch are padded as in `tagclip`; the padding counts in no softmax, mean, minimum or maximum, and maps are
0 there.

Shapes: b picture, n pair of a picture and a label, i j height and width of a batch in patches, l m positions (with the
class position first in what has d, patches alone in affinities), d width, p width of the shared space, k classes:
labels, then background.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from digzsl_jax.models import clip, tagclip

EXCLUDED = -1e9  # the logit of a class that is none of the picture's
ROUNDS = 3  # of normalising the columns, then the rows
HIGHEST_BYTE = 254  # of a released CAM, which ends just short of 1


def cams(model: clip.CLIPModel, hidden_bld: jax.Array, grids_b2: jax.Array, rows: int, columns: int,
         text_kp: jax.Array, allowed_bk: jax.Array, picture_n: jax.Array, label_n: jax.Array) -> jax.Array:
  """Grad-CAM (arXiv 1610.02391, eq. 1 and 2) of the last layer's first norm, 0 to 1 in each map, `[n, i, j]`.

  A map is scaled to its own range, so the gradient of a probability y may be that of log(y / (1 - y)), which is
  y (1 - y) times smaller and so does not vanish where y is 1 in float32.

  Args:
    hidden_bld: of `tagclip.features`, of pictures of `rows` times `columns` patches.
    text_kp: embeddings of labels and background, of length 1.
    allowed_bk: the classes that the softmax of a picture runs over: its labels and the background.
    picture_n: which pictures, rows of the batch.
    label_n: which classes of these, each among the allowed ones.
  """
  tower = model.vision_model
  last, patches = tower.encoder.layers[-1], len(picture_n)
  hidden_nld, grids_n2 = hidden_bld[picture_n], grids_b2[picture_n]
  bias_n11m = tagclip.bias(grids_n2, rows, columns)[:, None, None]
  inside_nij1 = tagclip.inside(grids_n2, rows, columns)[..., None]
  inside_nl1 = inside_nij1.reshape(patches, -1, 1)
  is_label_nk = jnp.arange(len(text_kp)) == label_n[:, None]
  activations_nld = last.layer_norm1(hidden_nld)

  def log_odds(shift_nd):
    """Of the labels, where all patches' activations are moved alike: its gradient is the sum of theirs."""
    moved_nld = activations_nld.at[:, 1:].add(jnp.where(inside_nl1, shift_nd[:, None], 0).astype(activations_nld.dtype))
    attended_nld, _, _ = last.self_attn(moved_nld, bias_n11m)
    out_nld = tower.post_layernorm(last.feed_forward(hidden_nld + attended_nld))[:, 1:]
    mean_nd = out_nld.mean(1, where=inside_nl1, dtype=jnp.float32).astype(out_nld.dtype)
    logits_nk = tagclip.logits(model, model.visual_projection(mean_nd), text_kp)
    rivals_nk = jnp.where(allowed_bk[picture_n] & ~is_label_nk, logits_nk, EXCLUDED)
    return logits_nk.sum(where=is_label_nk) - jax.nn.logsumexp(rivals_nk, axis=1).sum()

  weights_nd = jax.grad(log_odds)(jnp.zeros((patches, hidden_nld.shape[-1]), jnp.float32))
  found_nl = jnp.einsum("nd,nld->nl", weights_nd, activations_nld[:, 1:].astype(jnp.float32), precision="highest")
  found_nij1 = jnp.maximum(found_nl, 0).reshape(inside_nij1.shape)
  return tagclip.relative(found_nij1, inside_nij1)[0][..., 0]


def affinity(attention: Sequence[jax.Array], grids_b2: jax.Array, rows: int, columns: int, *, first_layer: int,
             last_layer: int) -> jax.Array:
  """How far what is found at patch m holds for patch l, `[b, l, m]`, by the attention between them; symmetric.

  The mean over layers, its columns and then its rows scaled to sum to 1 several times (Sinkhorn's way to a doubly
  stochastic matrix), then the mean with its transpose. 0 in the padding. Its square, which the released code forms, is
  that `refine` applies it twice.

  Args:
    attention: of `tagclip.features`, of pictures of `rows` times `columns` patches.
    first_layer: the first of the layers that are averaged, from 0: published 4 of 12.
    last_layer: the last one, included: published 10 of 12 for VOC, and 11 for COCO and COCO-Stuff.

  Raises:
    ValueError: layers that the model has not.
  """
  if not 0 <= first_layer <= last_layer < len(attention):
    raise ValueError(f"first_layer {first_layer} and last_layer {last_layer} do not fit a model of {len(attention)} "
                     "layers: 0 <= first_layer <= last_layer < layers")
  averaged = attention[first_layer:last_layer + 1]
  inside_bl1 = tagclip.inside(grids_b2, rows, columns).reshape(len(grids_b2), -1, 1)
  inside_blm = inside_bl1 & inside_bl1.swapaxes(1, 2)
  weights_blm = jnp.where(inside_blm, sum(averaged) / len(averaged), 0).astype(jnp.float32)
  for _ in range(ROUNDS):
    for axis in (1, 2):
      total = weights_blm.sum(axis, keepdims=True)
      weights_blm /= jnp.where(total == 0, 1, total)
  return (weights_blm + weights_blm.swapaxes(1, 2)) / 2


def refine(cams_nij: jax.Array, affinity_blm: jax.Array, grids_b2: jax.Array, picture_n: jax.Array, *,
           threshold: float, compat: bool = False) -> jax.Array:
  """Class-aware attention-based affinity: CAMs spread from the boxes around where they are high, `[n, i, j]`.

  Args:
    cams_nij: of `cams`.
    affinity_blm: of `affinity`.
    picture_n: as of `cams`.
    threshold: a box is that of a connected part above so much of the highest byte: published 0.4 for VOC, and 0.7 for
      COCO and COCO-Stuff.

  Returns:
    0 to 1 in each map; all 0 where the CAM is level.
  """
  n, rows, columns = cams_nij.shape
  grids_n2 = grids_b2[picture_n]
  inside_nij1 = tagclip.inside(grids_n2, rows, columns)[..., None]
  strong_nij = jnp.floor(cams_nij * 255) > int(threshold * HIGHEST_BYTE)  # of bytes, as the released code has it
  boxed_nij = tagclip.boxed(strong_nij[..., None])[..., 0]
  if compat:
    boxed_nij &= tagclip.inside(grids_n2 - 1, rows, columns)
  source_nm = jnp.where(boxed_nij, cams_nij, 0).reshape(n, -1)
  affinity_nlm = affinity_blm[picture_n]
  for _ in range(2):
    source_nm = jnp.einsum("nlm,nm->nl", affinity_nlm, source_nm, precision="highest")
  return tagclip.relative(source_nm.reshape(inside_nij1.shape), inside_nij1)[0][..., 0]
