"""Losses. Shapes: b row of a batch, d embedding, k class."""

import jax
import jax.numpy as jnp
import optax


def normalise(x: jax.Array) -> jax.Array:
  """Unit L2 norm along the last axis; a zero vector stays zero and has a finite gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def clip(images_bd: jax.Array, texts_bd: jax.Array, scale: jax.Array,
         counted_b: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Symmetric contrastive loss (arXiv 2103.00020, figure 3) and the accuracy of image to text.

  Args:
    images_bd: image embeddings, any norm.
    texts_bd: text embeddings, row b belongs to image b.
    scale: inverse temperature.
    counted_b: False leaves a pair out; the loss of no pairs at all is 0.
  """
  return _symmetric(scale * normalise(images_bd) @ normalise(texts_bd).T, counted_b)


def patch_clip(patches_bld: jax.Array, texts_bd: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same of patches, of which no one says what they show (PACL, arXiv 2212.04994).

  A text weighs the patches of an image by a softmax of its scaled cosines with them and is compared with their mean.

  Args:
    patches_bld: patch embeddings, any norm.
    texts_bd: as in `clip`, as is `scale`.
  """
  patches_bld, texts_bd = normalise(patches_bld), normalise(texts_bd)
  weights_blt = jax.nn.softmax(scale * jnp.einsum("bld,td->blt", patches_bld, texts_bd), axis=1)
  images_btd = normalise(jnp.einsum("blt,bld->btd", weights_blt, patches_bld))
  return _symmetric(scale * jnp.einsum("btd,td->bt", images_btd, texts_bd))


def _symmetric(logits_bb: jax.Array, counted_b: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of rows (images) and of columns (texts), their own being the diagonal; and the accuracy of rows."""
  own_b = jnp.arange(logits_bb.shape[0])
  loss, mean = optax.softmax_cross_entropy_with_integer_labels, jnp.mean
  if counted_b is not None:
    # Its own column stays in a row that does not count, which so has a finite gradient.
    logits_bb = jnp.where(counted_b & counted_b[:, None] | jnp.eye(len(own_b), dtype=bool), logits_bb, -jnp.inf)
    mean = lambda values_b: jnp.sum(jnp.where(counted_b, values_b, 0)) / jnp.maximum(counted_b.sum(), 1)
  both = (mean(loss(logits_bb, own_b)) + mean(loss(logits_bb.T, own_b))) / 2
  return both, mean(logits_bb.argmax(-1) == own_b)


def cosine_cross_entropy(embeds_bd: jax.Array, prototypes_kd: jax.Array, labels_b: jax.Array,
                         temperature: float, allowed_k: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy over cosine similarities, and the similarities themselves.

  `L = -log softmax_k(cos(a, v_k) / temperature)[label]`: the objective of the category discrimination
  model over seen classes and of the class tokens over unseen ones (arXiv 2412.17219).

  Args:
    embeds_bd: embeddings of images, any norm.
    prototypes_kd: one embedding per class, any norm.
    labels_b: row of the true prototype.
    temperature: divides the cosines; the paper shows none (1).
    allowed_k: False leaves a class out of the softmax.

  Returns:
    `(loss_b, cosines_bk)`, left-out classes having cosine `-inf`.
  """
  cosines_bk = normalise(embeds_bd) @ normalise(prototypes_kd).T
  if allowed_k is not None:
    cosines_bk = jnp.where(allowed_k, cosines_bk, -jnp.inf)
  loss_b = optax.softmax_cross_entropy_with_integer_labels(cosines_bk / temperature, labels_b)
  return loss_b, cosines_bk


def asymmetric(logits_bk: jax.Array, targets_bk: jax.Array, *, gamma_negative: float = 4, gamma_positive: float = 0,
               margin: float = 0.05) -> jax.Array:
  """Asymmetric loss of multi-label classification (arXiv 2009.14119).

  `-sum w log max(q, 1e-8)`, with q the probability of the target: `p = sigmoid(logit)` of a present class and
  `min(1 - p + margin, 1)` of an absent one. The focusing weight `w = (1 - q)^gamma` takes no part in the gradient, as
  in the published code. Computed in float32.

  Args:
    targets_bk: 1 present, 0 absent, -1 not judged, which adds nothing.
    gamma_negative: focusing of absent classes.
    gamma_positive: focusing of present ones; 0 weighs them all 1, as every published training script does.
    margin: absent classes of a lower probability add nothing.

  Returns:
    the sum over batch and classes, not their mean.
  """
  p_bk = jax.nn.sigmoid(logits_bk.astype(jnp.float32))

  def term(q_bk, gamma):
    return -jax.lax.stop_gradient((1 - q_bk)**gamma) * jnp.log(jnp.maximum(q_bk, 1e-8))
  present_bk, absent_bk = term(p_bk, gamma_positive), term(jnp.minimum(1 - p_bk + margin, 1), gamma_negative)
  return jnp.sum(jnp.where(targets_bk == 1, present_bk, jnp.where(targets_bk == 0, absent_bk, 0)))
