"""The tables of docs/precision.md: `python -m tests.bench_attention`, on a CPU with nothing else to do.

Seconds forwards, seconds with the gradient by queries, keys and values, the least of four calls that take turns, and
XLA's temporary memory in MiB for each.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax.models import attention

SHAPES = ((1, 4096, 4096, 8, 40), (2, 4096, 4096, 8, 40), (1, 1024, 1024, 8, 80), (2, 1024, 1024, 8, 80),
          (2, 256, 256, 8, 160), (1, 4096, 4096, 1, 512), (2, 4096, 77, 8, 40), (4, 577, 577, 16, 64))
WAYS = attention.whole, attention.by_queries, attention.by_heads


def compiled(way, given):
  """The programs forwards and with the gradient, and their temporary MiB."""
  back = jax.grad(lambda qkv: way(*qkv).astype(jnp.float32).sum())
  for function in (lambda qkv: way(*qkv), back):
    program = jax.jit(function).lower(given).compile()
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    yield lambda program=program: jax.block_until_ready(program(given)), memory


def main() -> None:
  for dtype in ("float32", "bfloat16"):
    print(f"\n| {dtype}: rows x queries x keys, heads of width |", " | ".join(f"`{way.__name__}`" for way in WAYS), "|")
    print("|---|---|---|---|")
    for b, queries, keys, h, d in SHAPES:
      draw = np.random.default_rng(0)
      given = tuple(jnp.asarray(draw.normal(size=(b, n, h, d)), dtype) for n in (queries, keys, keys))
      calls = [each for way in WAYS for each in compiled(way, given)]
      best = [np.inf] * len(calls)
      for _ in range(4):
        for number, (call, _) in enumerate(calls):
          began = time.perf_counter()
          call()
          best[number] = min(best[number], time.perf_counter() - began)
      cells = [f"{best[n]:.3f}, {best[n + 1]:.3f}; {calls[n][1]:.0f}, {calls[n + 1][1]:.0f}" for n in (0, 2, 4)]
      print(f"| {b} x {queries} x {keys}, {h} of {d} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
  main()
