"""Texts in CLIP's space, and labels: the mean of many prompts each, kept on disk for the next run.

Shapes: b text, l position, k label, t template, p width of the shared space.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from digzsl_jax import checkpoint, losses
from digzsl_jax.data import prompts
from digzsl_jax.data.tokenizer import Tokenizer
from digzsl_jax.models.clip import CLIPModel

CACHE = "~/.cache/digzsl_jax/texts"
BATCH = 256  # texts that are encoded at once
_STEP = 16  # positions; the padding behind the longest text is cut off in whole steps


def encode(model: CLIPModel, words: Tokenizer, texts: Sequence[str],
           progress: Callable[[int], tqdm.tqdm]) -> np.ndarray:
  """Unit embeddings `[b, p]`, float32; texts that are too long are cut, as CLIP's own tokenizer does.

  What stands behind the end of a text has no part in its embedding, as the tower is causal: padding that no text
  reaches is left out, which for prompts of real CLIPs is three quarters of the work.

  Args:
    progress: makes a bar for so many texts.
  """
  longest = min(max(len(words.ids(text)) for text in texts) + 2, words.length)  # with start and end
  length = min(-(-longest // _STEP) * _STEP, words.length)
  graphdef, params = nnx.split(model)
  size, rows = min(len(texts), BATCH), []
  with progress(len(texts)) as bar:
    for start in range(0, len(texts), size):
      batch = list(texts[start:start + size])
      ids_bl = words(batch + batch[-1:] * (size - len(batch)))[:, :length]  # one shape, one compilation
      rows.append(np.asarray(_encode(graphdef, params, ids_bl), np.float32)[:len(batch)])
      bar.update(len(batch))
  return np.concatenate(rows)


@functools.partial(jax.jit, static_argnums=0)  # outside of `encode`, so that a second call compiles nothing
def _encode(graphdef: nnx.GraphDef, params: nnx.State, ids_bl: jax.Array) -> jax.Array:
  return losses.normalise(nnx.merge(graphdef, params).encode_text(ids_bl)[0].astype(jnp.float32))


def check(names: Sequence[str], templates: Sequence[str], words: Tokenizer) -> None:
  """Raises ValueError if labels are none, empty, the same to CLIP, or too long for one of the templates."""
  if not names:
    raise ValueError("the list of labels is empty; name at least one")
  plain = [prompts.class_name(name).lower() for name in names]  # CLIP knows no capitals
  if twice := sorted({name for name, other in zip(names, plain) if plain.count(other) > 1}):
    raise ValueError(f"labels must differ, in more than capitals too, but these do not: {', '.join(map(repr, twice))}")
  for name, template in itertools.product(names, templates):
    text = template.format(name=prompts.class_name(name))
    if (count := len(words.ids(text))) > words.length - 2:
      raise ValueError(f"label {name[:60]!r} is too long: {template!r} with it has {count} tokens, and this CLIP reads "
                       f"{words.length - 2}; shorten it")


def of_labels(model: CLIPModel, words: Tokenizer, names: Sequence[str], templates: Sequence[str], *, key: str,
              cache: pathlib.Path | None, progress: Callable[[int], tqdm.tqdm]) -> np.ndarray:
  """`[k, p]`: of each label the mean of unit embeddings of its prompts, made a unit vector again.

  Args:
    names: of the labels.
    templates: with `{name}`.
    key: fingerprint of the checkpoint.
    cache: folder in which embeddings of a list of labels are kept; None keeps nothing.
    progress: as in `encode`.

  Raises:
    ValueError: as `check`.
  """
  check(names, templates, words)
  made_from = [key, list(names), list(templates), str(model.text_model.dtype), jax.__version__]
  path = cache and cache.expanduser() / f"{checkpoint.fingerprint(made_from)}.safetensors"
  if path and path.exists():
    return checkpoint.read_arrays(path)["texts_kp"]
  texts = list(itertools.chain(*prompts.expand(templates, names)))
  embeds_ktp = encode(model, words, texts, progress).reshape(len(names), len(templates), -1)
  mean_kp = embeds_ktp.mean(1)
  texts_kp = mean_kp / np.linalg.norm(mean_kp, axis=1, keepdims=True)
  if path:
    checkpoint.write_arrays(path, {"texts_kp": texts_kp})
  return texts_kp
