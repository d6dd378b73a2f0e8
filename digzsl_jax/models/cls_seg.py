"""CLS-SEG: masks of labels already decided, by a frozen CLIP.

TagCLIP (arXiv 2312.12828) takes CLIP-ES (arXiv 2212.09506) for this: Grad-CAM of each label against the picture's other
labels and a list of background classes (`cams`), then spread by the model's own attention within boxes of what was
found (`affinity`, `refine`). `clip_patches.features` gives what both start from. All are pure functions of fixed
shapes, of one label of each picture at a time.

Order of the steps as in the released code (github.com/linyq2117/TagCLIP, `CLIP-ES`): the score is the softmax of the
scaled cosine of the mean of the patches, without the class position, after the last norm and before the projection;
CAMs weigh the last layer's first norm. It rounds the model to half precision on a GPU, which is not done here.

`compat=True` does as the released code where that looks like an oversight: boxes leave out the last row and column of
the patches, even where the CAM is highest. Otherwise they reach the edge. In all else the two agree but for rounding:
it adds 1e-7 to what it divides by, so CAMs that small turn out empty there.

Pictures of a batch are padded as in `tagclip`; the padding counts in no softmax, mean, minimum or maximum, and maps are
0 there.

Shapes: b picture, i j height and width of a batch in patches, l m positions (with the class position first in what has
d, patches alone in affinities), d width, p width of the shared space, k classes: labels, then background.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from digzsl_jax.models import clip, clip_patches, tagclip
from digzsl_jax.models.attention import masked

EXCLUDED = -1e9  # the logit of a class that is none of the picture's
ROUNDS = 3  # of normalising the columns, then the rows
HIGHEST_BYTE = 254  # of a released CAM, which ends just short of 1


def cams(model: clip.CLIPModel, hidden_bld: jax.Array, grids_b2: jax.Array, rows: int, columns: int,
         text_kp: jax.Array, allowed_bk: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """Grad-CAM (arXiv 1610.02391, eq. 1 and 2) of the last layer's first norm.

  A map is scaled to its own range, so the gradient of a probability y may be that of log(y / (1 - y)), which is
  y (1 - y) times smaller and so does not vanish where y is 1 in float32.

  Args:
    hidden_bld: of `clip_patches.features`, of pictures of `rows` times `columns` patches.
    text_kp: embeddings of labels and background, of length 1.
    allowed_bk: the classes that the softmax of a picture runs over: its labels and the background.

  Returns:
    What makes maps `[b, i, j]`, 0 to 1 in each, of one allowed class of each picture, `label_b`. The last layer was run
    once for all of them; a call is the way back through it.
  """
  tower, inside_bij1 = model.vision_model, clip_patches.inside(grids_b2, rows, columns)[..., None]
  last, inside_bl1 = tower.encoder.layers[-1], inside_bij1.reshape(len(grids_b2), -1, 1)
  bias_bm = clip_patches.bias(grids_b2, rows, columns)
  activations_bld = last.layer_norm1(hidden_bld)

  def embeds(shift_bd):
    """Of the mean patch, where the activations of all are moved alike: its gradient is the sum of theirs."""
    moved_bld = activations_bld.at[:, 1:].add(jnp.where(inside_bl1, shift_bd[:, None], 0).astype(activations_bld.dtype))
    attended_blhd = masked(*last.self_attn.project(moved_bld), bias_bm)
    attended_bld = last.self_attn.out_proj(attended_blhd.reshape(hidden_bld.shape))
    out_bld = tower.post_layernorm(last.feed_forward(hidden_bld + attended_bld))[:, 1:]
    mean_bd = out_bld.mean(1, where=inside_bl1, dtype=jnp.float32).astype(out_bld.dtype)
    return model.visual_projection(mean_bd)

  embeds_bp, back = jax.vjp(embeds, jnp.zeros(hidden_bld[:, 0].shape, jnp.float32))

  def maps(label_b):
    is_label_bk = jnp.arange(len(text_kp)) == label_b[:, None]

    def log_odds(embeds_bp):
      logits_bk = clip_patches.logits(model, embeds_bp, text_kp)
      rivals_bk = jnp.where(allowed_bk & ~is_label_bk, logits_bk, EXCLUDED)
      return logits_bk.sum(where=is_label_bk) - jax.nn.logsumexp(rivals_bk, axis=1).sum()

    weights_bd, = back(jax.grad(log_odds)(embeds_bp))
    found_bl = jnp.einsum("bd,bld->bl", weights_bd, activations_bld[:, 1:].astype(jnp.float32), precision="highest")
    return tagclip.relative(jnp.maximum(found_bl, 0).reshape(inside_bij1.shape), inside_bij1)[0][..., 0]

  return maps


def affinity(attention: Sequence[jax.Array], grids_b2: jax.Array, rows: int, columns: int, *, first_layer: int,
             last_layer: int) -> jax.Array:
  """How far what is found at patch m holds for patch l, `[b, l, m]`, by the attention between them; symmetric.

  The mean over layers, its columns and then its rows scaled to sum to 1 several times (Sinkhorn's way to a doubly
  stochastic matrix), then the mean with its transpose. 0 in the padding. Its square, which the released code forms, is
  that `refine` applies it twice.

  Args:
    attention: of `clip_patches.features`, of pictures of `rows` times `columns` patches.
    first_layer: the first of the layers that are averaged, from 0: published 4 of 12.
    last_layer: the last one, included: published 10 of 12 for VOC, and 11 for COCO and COCO-Stuff.

  Raises:
    ValueError: layers that the model has not.
  """
  check(len(attention), first_layer, last_layer)
  averaged = attention[first_layer:last_layer + 1]
  inside_bl1 = clip_patches.inside(grids_b2, rows, columns).reshape(len(grids_b2), -1, 1)
  inside_blm = inside_bl1 & inside_bl1.swapaxes(1, 2)
  weights_blm = jnp.where(inside_blm, sum(averaged) / len(averaged), 0).astype(jnp.float32)
  for _ in range(ROUNDS):
    for axis in (1, 2):
      total = weights_blm.sum(axis, keepdims=True)
      weights_blm /= jnp.where(total == 0, 1, total)
  return (weights_blm + weights_blm.swapaxes(1, 2)) / 2


def features_and_affinity(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array, *, first_layer: int,
                          last_layer: int) -> tuple[jax.Array, jax.Array]:
  """What `clip_patches.features` starts with and the `affinity` of the rest, which is used up layer by layer."""
  check(len(model.vision_model.encoder.layers), first_layer, last_layer)
  rows, columns = tagclip.grid(*images_bijc.shape[1:3], model.vision_model.embeddings.patch_size)
  inside_bij, layers = clip_patches.inside(grids_b2, rows, columns), itertools.count()
  sum_blm = jnp.zeros((len(grids_b2), rows * columns, rows * columns))

  def take(weights_blm, x):
    nonlocal sum_blm
    if first_layer <= next(layers) <= last_layer:
      (sum_blm,), x = clip_patches.in_turn(inside_bij, lambda *both: (sum(both),), (sum_blm,), weights_blm, x)
    return x

  hidden_bld, _ = clip_patches.each_layer(model, images_bijc, grids_b2, take)
  return hidden_bld, affinity([sum_blm], grids_b2, rows, columns, first_layer=0, last_layer=0)


def check(layers: int, first_layer: int, last_layer: int) -> None:
  """Raises ValueError if a model of so many layers has none of these for `affinity`."""
  if not 0 <= first_layer <= last_layer < layers:
    raise ValueError(f"first_layer {first_layer} and last_layer {last_layer} do not fit a model of {layers} layers: "
                     "0 <= first_layer <= last_layer < layers")


def refine(cams_bij: jax.Array, affinity_blm: jax.Array, grids_b2: jax.Array, *, threshold: float,
           compat: bool = False) -> jax.Array:
  """Class-aware attention-based affinity: CAMs spread from the boxes around where they are high, `[b, i, j]`.

  Args:
    cams_bij: of one label of each picture.
    affinity_blm: of `affinity`.
    threshold: a box is that of a connected part above so much of the highest byte: published 0.4 for VOC, and 0.7 for
      COCO and COCO-Stuff.

  Returns:
    0 to 1 in each map; all 0 where the CAM is level.
  """
  b, rows, columns = cams_bij.shape
  inside_bij1 = clip_patches.inside(grids_b2, rows, columns)[..., None]
  strong_bij = jnp.floor(cams_bij * 255) > int(threshold * HIGHEST_BYTE)  # of bytes, as the released code has it
  boxed_bij = tagclip.boxed(strong_bij[..., None])[..., 0]
  if compat:
    boxed_bij &= clip_patches.inside(grids_b2 - 1, rows, columns)
  source_bm = jnp.where(boxed_bij, cams_bij, 0).reshape(b, -1)
  for _ in range(2):
    source_bm = jnp.einsum("blm,bm->bl", affinity_blm, source_bm, precision="highest")
  return tagclip.relative(source_bm.reshape(inside_bij1.shape), inside_bij1)[0][..., 0]
