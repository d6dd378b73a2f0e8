"""CLIP's vision tower on pictures of any size: embeddings of patches, their attention, and what padding needs.

Pictures of a batch are padded at the bottom and on the right to a common size; `grids_b2` says how many rows and
columns of patches each really has.

Shapes: b picture, i j height and width of a batch in pixels or patches, r s those that a model was trained on, l m
positions (patches row by row), n any row, o output, d width, p width of the shared space, c colours, k classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from digzsl_jax.models import attention as heads
from digzsl_jax.models import clip


def features(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
  """The vision tower up to its last layer.

  Args:
    images_bijc: normalised, of whole patches, padded with anything finite.
    grids_b2: rows and columns of patches of each picture.

  Returns:
    `(hidden_bld, attention)`: what enters the last layer, the class position first, and the mean over heads from patch
    to patch, `[b, l, m]` of every layer, the last too; rows are short of 1 by what goes to the class position.

  Raises:
    ValueError: sides of `images_bijc` that are no whole patches.
  """
  attention = []
  hidden_bld, _ = each_layer(model, images_bijc, grids_b2, into(attention))
  return hidden_bld, attention


def into(attention: list) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """For `each_layer`: keeps everything."""
  def take(weights_blm, x):
    attention.append(weights_blm)
    return x
  return take


def each_layer(model: clip.CLIPModel, images_bijc: jax.Array, grids_b2: jax.Array,
               take: Callable[[jax.Array, jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
  """`features` that gives the attention of one layer after another away.

  Args:
    take: `take(weights_blm, x) -> x` of each layer; what comes after is computed from `x`, which stays as it is.

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
  bias_bm = bias(grids_b2, rows, columns)
  for layer in tower.encoder.layers:
    before_bld, own = x_bld, layer.self_attn
    q_blhd, k_blhd, v_blhd = own.project(layer.layer_norm1(x_bld))
    attended_blhd, weights_blm = heads.with_mean(q_blhd, k_blhd, v_blhd, bias_bm)
    attended_blhd = take(weights_blm[:, 1:, 1:], attended_blhd)
    x_bld = layer.feed_forward(before_bld + own.out_proj(attended_blhd.reshape(x_bld.shape)))
  return before_bld, v_blhd.reshape(x_bld.shape)


def in_turn(inside: jax.Array, step: Callable, kept: tuple, weights_blm: jax.Array, x):
  """`(step(*kept, weights_blm), x)`, where nothing that is computed from the returned `x` comes before the step.

  `inside`, of pictures, begins with a patch of one. But the compiler does not know, and so cannot put off the step
  until it has the weights of all layers, as it would to do it in one go.
  """
  taken = lambda kept, x, weights_blm: (step(*kept, weights_blm), x)
  nothing = lambda kept, x, _: jax.tree.map(jnp.zeros_like, (kept, x))
  return jax.lax.cond(inside.reshape(-1)[0], taken, nothing, kept, x, weights_blm)


def patch_embeds(model: clip.CLIPModel, before_bld: jax.Array, values_bld: jax.Array) -> jax.Array:
  """Embeddings `[b, l, p]`, of any norm, of the patches, out of the last layer's input and values."""
  tower, last = model.vision_model, model.vision_model.encoder.layers[-1]
  x_bld = last.feed_forward(before_bld + last.self_attn.out_proj(values_bld))
  return model.visual_projection(tower.post_layernorm(x_bld[:, 1:]))


def logits(model: clip.CLIPModel, embeds: jax.Array, text_kp: jax.Array) -> jax.Array:
  """The scaled cosine of embeddings, `[..., p]`, and classes, `[..., k]`, float32."""
  embeds = embeds.astype(jnp.float32)
  embeds /= jnp.linalg.norm(embeds, axis=-1, keepdims=True)
  cosines = jnp.einsum("...p,kp->...k", embeds, text_kp.astype(jnp.float32), precision="highest")
  return jnp.exp(model.logit_scale[...].astype(jnp.float32)) * cosines


def inside(grids_b2: jax.Array, rows: int, columns: int) -> jax.Array:
  """Which patches of the batch are of the picture, `[b, i, j]`."""
  return (jnp.arange(rows)[:, None] < grids_b2[:, :1, None]) & (jnp.arange(columns) < grids_b2[:, 1:, None])


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
  down_bir, across_bjs = (bilinear(jnp.zeros_like(sizes_b), jnp.full_like(sizes_b, side), side, sizes_b, most)
                          for sizes_b, most in zip(grids_b2.T, (rows, columns)))
  grid_bijd = _half(jnp.einsum("bir,bjs,rsd->bijd", down_bir, across_bjs, own_rsd, precision="highest"))
  kept_ijd = jnp.pad(own_rsd, ((0, max(rows - side, 0)), (0, max(columns - side, 0)), (0, 0)))[:rows, :columns]
  grid_bijd = jnp.where((grids_b2 == side).all(1)[:, None, None, None], kept_ijd, grid_bijd)
  b, width = len(grids_b2), table_ld.shape[1]
  class_b1d = jnp.broadcast_to(table_ld[:1], (b, 1, width))
  return jnp.concatenate([class_b1d, grid_bijd.reshape(b, -1, width)], axis=1).astype(embeddings.dtype)


def bilinear(start_n: jax.Array, length_n: jax.Array, inputs: int, outputs_n: jax.Array, most: int) -> jax.Array:
  """Weights `[n, most, inputs]` that resize `length` of `inputs` pixels, from `start` on, to `outputs`.

  PyTorch's bilinear `interpolate` with `align_corners=False` along one axis: no antialias, the border repeated. What is
  beyond `outputs` repeats the last one.
  """
  ratio_n1 = (length_n / outputs_n)[:, None]
  place_no = jnp.clip((jnp.arange(most) + 0.5) * ratio_n1 - 0.5, 0, (length_n - 1)[:, None])
  return jnp.maximum(1 - jnp.abs(place_no[..., None] - (jnp.arange(inputs) - start_n[:, None])[:, None]), 0)


def _half(x: jax.Array) -> jax.Array:
  """`x` rounded to half precision: XLA may drop a conversion to and fro, and `reduce_precision` drops subnormals."""
  subnormal = jnp.round(x * 2.0**24) * 2.0**-24
  return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10))
