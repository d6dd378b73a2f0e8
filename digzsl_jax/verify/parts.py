"""What is compared: the inputs of every part, how far apart two answers may be, and how a side is measured.

Shapes: b batch, l position, h w latent, y x pixel, z latent channel, d text width, c colour.
"""

import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from digzsl_jax import checkpoint, files

TEXTS = ("", "a photo of a bird", "a small red bird with blue wings, painting", "Snow's  BIRDS & 3 wings\n!",
         "\u00e9t\u00e9 \u2603 42", "a bird in the snow " * 30)
TOKEN = 3  # position of the one that a gradient is taken by
TIMESTEP = 601
STEPS = 4  # of the short sampling
GUIDANCE = 3.0
TRAJECTORIES = (1, 4, 7, 25)  # numbers of steps that schedulers are compared over

# Largest absolute difference in float32, for answers of order one; larger answers are divided by their largest.
BOUNDS = {"tokenizer": 0.0, "text": 1e-5, "unet": 1e-5, "vae.decode": 5e-5, "vae.encode": 5e-5, "token gradient": 1e-4,
          "scheduler": 1e-5, "sampling": 1e-4}


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Sizes that both sides read off the folder's configs.

  Attributes:
    latent: height, width and channels.
    factor: pixels to a latent position.
    text: length and width of the text states.
  """
  latent: tuple[int, int, int]
  factor: int
  text: tuple[int, int]


def inputs(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
  """Random numbers for every part, batch of one, channels last."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  h, w, z = shapes.latent
  return {"latents_bhwz": normal(1, h, w, z), "text_bld": normal(1, *shapes.text), "token_d": normal(shapes.text[1]),
          "weights_byxc": normal(1, h * shapes.factor, w * shapes.factor, 3) / (h * w * shapes.factor**2),
          "images_byxc": np.tanh(normal(1, h * shapes.factor, w * shapes.factor, 3))}


def toy(tanh: Callable, x: Any, t: Any) -> Any:
  """A nonlinear denoiser under which latents stay of order one, to compare schedulers by."""
  u = (t + 1) / 1000
  return u * x + (1 - u) * tanh(2 * x + 3 * u) / 2


class Memory:
  """The process's largest resident size since `reset`, in GiB; since its start where the system cannot reset it."""

  def reset(self) -> None:
    try:
      pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
      pass

  def peak(self) -> float:
    try:
      status = pathlib.Path("/proc/self/status").read_text()
      return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
      unit = 1 if sys.platform == "darwin" else 2**10
      return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def run(side: str, parts: Iterator[tuple[str, Callable[[], Callable[[], Mapping]]]], folder: pathlib.Path,
        repeats: int) -> None:
  """Measures a side's parts one by one and leaves answers and figures in `folder`.

  Args:
    side: "jax" or "torch", the name of the files.
    parts: name and a function that loads what the part needs and gives the function to be measured.
    folder: gets `<side>.safetensors` and `<side>.json`.
    repeats: calls after the first, the best of which counts.
  """
  memory, answers, figures = Memory(), {}, {}
  for name, load in parts:
    memory.reset()
    began = time.perf_counter()
    call = load()
    loaded = time.perf_counter()
    answer = call()
    seconds, first, first_peak = [], time.perf_counter() - loaded, memory.peak()
    memory.reset()
    for _ in range(repeats):
      again = time.perf_counter()
      call()
      seconds.append(time.perf_counter() - again)
    answers |= {f"{name}/{key}": np.ascontiguousarray(value) for key, value in answer.items()}
    figures[name] = {"load": loaded - began, "first": first, "seconds": min(seconds, default=first),
                     "first_peak": first_peak, "peak": memory.peak() if repeats else first_peak}
    print(f"{side}: {name}: {first:.1f} s and {first_peak:.1f} GiB the first time, then "
          f"{figures[name]['seconds']:.2f} s, {figures[name]['peak']:.1f} GiB", flush=True)
    del call, answer
  checkpoint.write_arrays(folder / f"{side}.safetensors", answers)
  files.write_json(folder / f"{side}.json", figures)
