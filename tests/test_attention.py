"""Every way of computing attention gives the same, forwards and backwards, and holds less where it says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digzsl_jax.models import attention, platforms


def projections(queries, keys, dtype=jnp.float32, b=2, h=3, d=8):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(b, n, h, d)), dtype) for n in (queries, keys, keys))


def gradients(implementation, qkv):
  weights = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
  return jax.jit(jax.grad(lambda qkv: (weights * implementation(*qkv)).sum()))(qkv)


@pytest.mark.parametrize("queries, keys", [(4, 4), (16, 16), (17, 16), (33, 5), (1, 7)])
@pytest.mark.parametrize("parts", [attention.by_queries, attention.by_heads])
def test_parts_equal_the_whole(monkeypatch, parts, queries, keys):
  monkeypatch.setattr(attention, "BLOCK", 8)
  qkv = projections(queries, keys)
  np.testing.assert_allclose(jax.jit(parts)(*qkv), attention.whole(*qkv), rtol=0, atol=2e-6)
  for ours, wanted in zip(gradients(parts, qkv), gradients(attention.whole, qkv)):
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", [attention.whole, attention.by_queries, attention.by_heads])
def test_bfloat16_differs_by_its_rounding_alone(implementation):
  qkv = projections(16, 16, jnp.bfloat16)
  wanted = attention.whole(*(x.astype(jnp.float32) for x in qkv))
  out = implementation(*qkv)
  assert out.dtype == jnp.bfloat16
  # of the weights and of the output: half of 2**-8 of values up to three, each
  np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=0, atol=3 * 2**-8)


@pytest.mark.parametrize("parts", [attention.by_queries, attention.by_heads])
def test_parts_take_less_memory_forwards_and_backwards(parts):
  qkv = projections(2048, 2048, b=1)
  gradient = lambda implementation: jax.grad(lambda qkv: implementation(*qkv).sum())
  held = lambda function: jax.jit(function).lower(qkv).compile().memory_analysis().temp_size_in_bytes
  # Bytes of all logits and their powers, which XLA:CPU fuses away in the whole, forwards.
  both = 2 * 4 * 3 * 2048 * 2048
  assert held(lambda qkv: parts(*qkv)) < both / 2
  small, large = (held(gradient(one)) for one in (parts, attention.whole))
  assert small < large / 2, (small, large)


def test_choice():
  long, text = ((2, 4096, 8, 40), 4096), ((2, 4096, 8, 40), 77)
  named = lambda platform, dtype, case: attention.choose(platform, dtype, *case).__name__
  assert named("cpu", jnp.float32, long) == named("cpu", jnp.bfloat16, long) == "by_heads"
  assert named("cpu", jnp.float32, ((2, 64, 4, 22), 64)) == named("cpu", jnp.float32, text) == "whole"
  assert named("cpu", jnp.float32, ((4, 577, 16, 64), 577)) == "by_heads"
  assert named("gpu", jnp.bfloat16, long) == "flash"
  assert named("gpu", jnp.bfloat16, text) == "whole"
  assert named("gpu", jnp.float32, long) == named("tpu", jnp.bfloat16, long) == "whole"  # 2**28 weights: one GiB
  assert named("gpu", jnp.float32, ((4, 4096, 8, 40), 4096)) == "by_queries"
  assert named("gpu", jnp.bfloat16, ((1, 4096, 1, 512), 4096)) == "whole"  # wider than the kernel takes


def test_a_model_uses_the_choice(monkeypatch):
  monkeypatch.setattr(attention, "LONG", 1)
  monkeypatch.setattr(attention, "by_heads", lambda *qkv: attention.whole(*qkv) + 1)
  qkv = projections(4, 4)
  np.testing.assert_array_equal(attention.attend(*qkv), attention.whole(*qkv) + 1)


def test_a_program_is_traced_for_the_platform_that_is_told(monkeypatch):
  monkeypatch.setattr(attention, "choose", lambda platform, *_: traced.append(platform) or attention.whole)
  traced, qkv, attend = [], projections(4, 4), jax.jit(attention.attend)
  attend(*qkv)
  with platforms.tracing_for("tpu"):
    attend.lower(*qkv)
    attend.lower(*qkv)  # known
  attend(*qkv)
  assert traced == ["cpu", "tpu"] and platforms.platform() == "cpu"
