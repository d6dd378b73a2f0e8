"""One cycle and its Adam: the ends, few steps, what decays, and going on from a saved state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digzsl_jax import optimisers


def test_the_cycle_rises_for_a_fifth_and_falls_to_the_last_step():
  rate, beta1 = optimisers.one_cycle(50, 0.5)
  np.testing.assert_allclose(rate(jnp.array([0, 9, 49, 80])), [0.5 / 25, 0.5, 0.5 / 25e4, 0.5 / 25e4], rtol=1e-6)
  np.testing.assert_allclose(beta1(jnp.array([0, 9, 49, 80])), [0.95, 0.85, 0.95, 0.95], rtol=1e-6)
  falls = np.diff(rate(jnp.arange(50))) < 0
  assert falls.tolist() == [False] * 9 + [True] * 40


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_few_steps_only_fall(steps):
  rates = np.asarray(optimisers.one_cycle(steps, 1.0)[0](jnp.arange(steps)))
  assert (rates > 0).all() and (np.diff(rates) < 0).all() and rates[-1] == pytest.approx(1 / 25e4)


def test_no_steps():
  with pytest.raises(ValueError, match="one cycle of 0 steps"):
    optimisers.adam(0, 0.1, 0.0, True)


def test_matrices_decay_and_vectors_do_not():
  params = {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
  for coupled in (True, False):
    tx = optimisers.adam(10, 0.1, 0.5, coupled)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decay = 0.1 / 25 * (1 if coupled else 0.5)  # Adam makes any gradient one of size 1 at its first step
    np.testing.assert_allclose(updates["weight"], -decay, rtol=1e-4)
    assert not updates["bias"].any() and not updates["scale"].any()


def test_a_saved_state_goes_on_bit_for_bit():
  tx = optimisers.adam(12, 0.1, 0.01, True)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(2 * params, state, params)
    return params + updates, state

  def run(params, state, count):
    for _ in range(count):
      params, state = step(params, state)
    return params, state
  start = jnp.arange(6.0).reshape(2, 3)
  whole = run(start, tx.init(start), 12)
  saved = jax.tree.map(np.asarray, run(start, tx.init(start), 5))  # what a checkpoint holds: arrays alone
  assert jax.tree.all(jax.tree.map(np.array_equal, run(*saved, 7), whole))
  assert not np.array_equal(saved[0], whole[0])
