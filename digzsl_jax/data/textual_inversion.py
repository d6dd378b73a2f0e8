"""Learnt tokens as files: vectors that stand in a prompt for a word (textual inversion, arXiv 2208.01618).

Shapes: n vector of a token, or of all tokens one after another; d width of the text tower.
"""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from digzsl_jax import files
from digzsl_jax.data import tokenizer

_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}


def read(path: os.PathLike, width: int | None = None) -> dict[str, np.ndarray]:
  """Reads the tokens of a safetensors file.

  Args:
    path: a file of diffusers (the token is its one key), of Automatic1111 (`emb_params`; the token is the file's
      name), or of several tokens, as `learned_embeds.safetensors` of a run holds one per class.
    width: of the text tower that shall take them; None takes any.

  Returns:
    `{token: vectors_nd}`, float32, in the file's order; a single vector is `[1, d]`.

  Raises:
    ValueError: no such file, a pickle, a file of Stable Diffusion XL, a damaged one, or vectors that are not finite
      or not `width` wide.
  """
  path = pathlib.Path(path)
  if path.suffix in files.PICKLES:
    new = path.with_suffix(".safetensors").name
    raise ValueError(f"{path} is a pickle, which can run any code and is never read; convert it where PyTorch is "
                     f"installed: python -m digzsl_jax.convert {path} {new}")
  try:
    stored = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is missing, truncated or no safetensors file ({error}); download it again, a Git LFS "
                     "pointer with git lfs pull") from error
  if {"clip_l", "clip_g"} & stored.keys():
    raise ValueError(f"{path} holds {sorted(stored)}: vectors for the two text towers of Stable Diffusion XL, which is "
                     "not supported; take a file made for Stable Diffusion 1.x or 2.x")
  if not stored:
    raise ValueError(f"{path} holds no token; make or download it again")
  if stored.keys() == {"emb_params"}:
    stored = {path.stem: stored["emb_params"]}
  return {token: _checked(vectors, width, f"{path}: token {token!r}") for token, vectors in stored.items()}


def _checked(vectors: np.ndarray, width: int | None, what: str) -> np.ndarray:
  """Vectors as `[n, d]` float32; a ValueError, which begins with `what`, if they cannot be those of a token."""
  if vectors.ndim not in (1, 2) or not vectors.size or vectors.dtype.kind not in "fV":  # V: bfloat16
    raise ValueError(f"{what} is {vectors.dtype} of shape {vectors.shape}; vectors are floating numbers [d] or [n, d]")
  with np.errstate(over="ignore"):  # what float32 cannot hold is infinite then, and refused below
    vectors_nd = np.atleast_2d(vectors).astype(np.float32)
  if width not in (None, found := vectors_nd.shape[1]):
    made_for, wanted = (f" ({_FAMILIES[size]})" if size in _FAMILIES else "" for size in (found, width))
    raise ValueError(f"{what} is {found} wide{made_for}, but the text tower {width}{wanted}; take a file that was made "
                     "for this checkpoint's family")
  if not np.isfinite(vectors_nd).all():
    raise ValueError(f"{what} has values that are not finite; make or download it again")
  return vectors_nd


def write(path: os.PathLike, token: str, vectors: np.ndarray) -> None:
  """Writes one token as a file that `load_textual_inversion` of diffusers opens by itself.

  Args:
    path: where to; safetensors whatever it is called.
    token: what prompts call it, "<bird>": no word of the vocabulary.
    vectors: `[n, d]` or `[d]`; a single vector is stored as `[d]`.

  Raises:
    ValueError: these are no vectors of a token.
    OSError: as `files.write_atomic`.
  """
  vectors_nd = _checked(np.asarray(vectors), None, f"{path}: token {token!r}")
  stored = {token: vectors_nd[0].copy() if len(vectors_nd) == 1 else np.ascontiguousarray(vectors_nd)}
  files.write_atomic(path, lambda temporary: safetensors.numpy.save_file(stored, temporary, {"format": "pt"}))


def extend(words: tokenizer.Tokenizer, tokens: Mapping[str, np.ndarray]) -> tuple[tokenizer.Tokenizer, np.ndarray]:
  """What prompts with learnt tokens need, as `load_textual_inversion` prepares a pipeline.

  Args:
    words: the checkpoint's tokenizer.
    tokens: as `read` returns them; several files are joined by `|`.

  Returns:
    `(words, vectors_nd)`: a tokenizer that knows the tokens, and the vectors that its ids beyond the vocabulary of
    the first stand for, in their order: `StableDiffusion.text(words(prompts), vectors_nd)`.

  Raises:
    ValueError: as `Tokenizer.with_tokens`.
  """
  extended = words.with_tokens({token: len(vectors_nd) for token, vectors_nd in tokens.items()})
  return extended, np.concatenate(list(tokens.values()))
