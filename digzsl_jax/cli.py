"""What every command line of the package does before its work and with a user's mistake."""

import argparse
import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator

import jax


def start() -> None:
  """Keeps compiled programs for the next run, and JAX's remarks on absent accelerators from the screen."""
  logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/digzsl_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.monitoring.register_event_duration_secs_listener(_give_back)


def _give_back(event: str, seconds: float, **_) -> None:
  """After a long compilation its memory goes back to the system: glibc would keep gigabytes for a large model."""
  if event == "/jax/core/compile/backend_compile_duration" and seconds > 2 and sys.platform == "linux":
    with contextlib.suppress(AttributeError):  # another C library
      ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def answer_in_one_line(hint: str) -> Iterator[None]:
  """A wrong value or file ends the program with a message and `hint` instead of a traceback."""
  try:
    yield
  except (ValueError, OSError) as error:
    if os.environ.get("DIGZSL_TRACEBACK"):
      raise
    sys.exit(f"error: {error}\n(set DIGZSL_TRACEBACK=1 for the traceback; {hint})")


def at_least(least: int) -> Callable[[str], int]:
  """For argparse: an integer that is not below `least`."""
  def number(text: str) -> int:
    if (value := int(text)) < least:
      raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value
  return number
