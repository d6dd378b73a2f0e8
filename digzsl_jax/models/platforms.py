"""The platform that a program is traced for, where code differs by it: this process's own unless it is told."""

import contextlib

import jax

# Part of the key of JAX's caches, so that no trace of one platform is taken for another's.
_told = jax.make_user_context(None)


def platform() -> str:
  """"cpu", "gpu" or "tpu"; to be asked while tracing."""
  return _told.value or jax.default_backend()


def tracing_for(name: str) -> contextlib.AbstractContextManager:
  """What is traced inside is for platform `name`: for compilation ahead of time, without its devices."""
  return _told(name)
