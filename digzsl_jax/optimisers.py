"""Optimisers: Adam under the one-cycle policy (Smith and Topin, arXiv 1708.07120), as PyTorch has it.

`optax.cosine_onecycle_schedule` is another schedule: its peak comes one step later and its end is a step after the
last; and optax has no schedule for a moment's decay.
"""

import jax
import jax.numpy as jnp
import optax

WARM, START, END = 0.2, 1 / 25, 1 / 25e4  # share of the steps until the peak, first and last rate over the peak's
HIGH, LOW = 0.95, 0.85  # beta1 at the ends and at the peak


def one_cycle(steps: int, peak: float) -> tuple[optax.Schedule, optax.Schedule]:
  """Learning rate and Adam's beta1 of each step, from 0: `OneCycleLR(max_lr=peak, pct_start=0.2)` of PyTorch.

  The rate goes from `peak / 25` up to `peak` within a fifth of the steps and down to `peak / 250000` at the last, both
  along half a cosine, and stays there; beta1 goes from 0.95 to 0.85 and back. Of five steps or fewer it only goes down.

  Raises:
    ValueError: there are no steps.
  """
  if steps < 1:
    raise ValueError(f"one cycle of {steps} steps: there must be at least 1")
  top, last = WARM * steps - 1, steps - 1

  def height(count):
    """0 at the ends, 1 at the peak: `(1 - cos) / 2`, without its rounding near 0."""
    rising, falling = count / top if top > 0 else 1, (last - count) / (last - top)
    return jnp.sin(jnp.pi / 2 * jnp.clip(jnp.minimum(rising, falling), 0, 1))**2

  def rate(count):
    low = peak * jnp.where(count <= top, START, END)
    return low + (peak - low) * height(count)
  return rate, lambda count: HIGH + (LOW - HIGH) * height(count)


def adam(steps: int, peak: float, weight_decay: float, coupled: bool) -> optax.GradientTransformation:
  """Adam with both schedules of `one_cycle`; the place in the cycle is part of its state.

  As in PyTorch the bias of the first moment is corrected by the step's own beta1, `1 - beta1^t`.

  Args:
    weight_decay: of parameters with two axes or more; biases and norms have none.
    coupled: adds the decay to the gradient, before Adam (L2, `torch.optim.Adam`); else to Adam's step (`AdamW`).
  """
  rate, beta1 = one_cycle(steps, peak)

  def update(grads, state, params=None):
    return optax.scale_by_adam(b1=beta1(state.count)).update(grads, state, params)
  scale = optax.GradientTransformation(optax.scale_by_adam().init, update)
  decay = optax.add_decayed_weights(weight_decay, lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
  return optax.chain(*((decay, scale) if coupled else (scale, decay)), optax.scale_by_learning_rate(rate))
