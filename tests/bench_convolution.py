"""The table of docs/precision.md: `python -m tests.bench_convolution`, on a CPU with nothing else to do.

Milliseconds of XLA's own convolution and of the way that `convolution.choose` takes, forwards and back to the image:
the least of eight calls that take turns.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from digzsl_jax.models import convolution

SHAPES = ((1, 64, 320, 320), (1, 64, 960, 320), (1, 32, 640, 640), (1, 32, 1920, 640), (1, 16, 1280, 1280),
          (1, 16, 2560, 1280), (1, 8, 1280, 1280), (2, 64, 320, 320), (2, 32, 640, 640), (2, 16, 1280, 1280),
          (2, 8, 1280, 1280), (1, 128, 512, 512), (1, 256, 256, 256), (1, 512, 128, 128))
OPTIONS = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
WAYS = convolution.plain, convolution.convolve


def compiled(way, dtype, shape):
  """Output, and the way back to the image, of `way`."""
  b, side, c, o = shape
  draw = np.random.default_rng(0)
  x, kernel, grad = (jnp.asarray(draw.normal(size=size, scale=0.05).astype(np.float32), dtype)
                     for size in ((b, side, side, c), (3, 3, c, o), (b, side, side, o)))
  forward = lambda x, kernel: way(x, kernel, (1, 1), convolution.PADDING, **OPTIONS)
  back = lambda x, kernel, grad: jax.vjp(lambda x: forward(x, kernel), x)[1](grad)
  for function, given in ((forward, (x, kernel)), (back, (x, kernel, grad))):
    program = jax.jit(function).lower(*given).compile()
    yield lambda program=program, given=given: jax.block_until_ready(program(*given))


def main() -> None:
  print("| type | images | channels | XLA's | ours | back: XLA's | ours | way |\n|---|---|---|---|---|---|---|---|")
  for dtype in ("float32", "bfloat16"):
    for b, side, c, o in SHAPES:
      calls = [call for way in WAYS for call in compiled(way, dtype, (b, side, c, o))]
      best = [np.inf] * len(calls)
      for _ in range(8):
        for number, call in enumerate(calls):
          began = time.perf_counter()
          call()
          best[number] = min(best[number], 1e3 * (time.perf_counter() - began))
      way = convolution.choose("cpu", dtype, b * side * side, (side, side), (3, 3, c, o), True)
      times = " | ".join(f"{best[at]:.1f}" for at in (0, 2, 1, 3))
      print(f"| {dtype} | {b} x {side} x {side} | {c} to {o} | {times} | {way} |", flush=True)


if __name__ == "__main__":
  main()
