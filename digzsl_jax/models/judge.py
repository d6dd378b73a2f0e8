"""A small classifier with one head per attribute, trained on real pictures of all classes.

It reports whether a generated picture shows what its prompt names. It is never used for guidance, so
a token that fools the category discrimination model does not fool it for free.

Shapes: b batch, h w pixels, c channel, k class, m image of a class.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digzsl_jax.models import layers


class Judge(nnx.Module):
  """Convolutions of stride 2 down to 4x4, then a mean and linear heads."""

  def __init__(self, heads: Mapping[str, int], width: int, blocks: int, *, dtype, rngs: nnx.Rngs):
    widths = [3] + [width * 2**level for level in range(blocks)]
    self.convs = nnx.List([layers.conv(a, b, 3, stride=2, dtype=dtype, rngs=rngs)
                           for a, b in zip(widths, widths[1:])])
    self.mixes = nnx.List([layers.conv(b, b, 3, dtype=dtype, rngs=rngs) for b in widths[1:]])
    self.norms = nnx.List([layers.group_norm(b, 8, 1e-5, dtype=dtype, rngs=rngs) for b in widths[1:]])
    self.heads = nnx.Dict({name: layers.linear(widths[-1], size, dtype=dtype, rngs=rngs)
                           for name, size in heads.items()})

  @classmethod
  def from_json(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "Judge":
    heads = {name: len(labels) for name, labels in config["heads"].items()}
    return cls(heads, config["width"], config["blocks"], dtype=dtype, rngs=rngs)

  def __call__(self, images_bhwc: jax.Array) -> dict[str, jax.Array]:
    """Logits of every head for images in [-1, 1]."""
    x = images_bhwc
    for conv, mix, norm in zip(self.convs, self.mixes, self.norms):
      x = jax.nn.silu(conv(x))
      x = x + jax.nn.silu(mix(norm(x)))
    x_bc = x.mean((1, 2))
    return {name: head(x_bc) for name, head in self.heads.items()}


def targets(config: Mapping, name: str) -> dict[str, int]:
  """The label number of every head for a class name: the label that is the name or one of its words.

  Raises:
    ValueError: a head has none of them, or several.
  """
  words, found = {name, *name.split()}, {}
  for head, labels in config["heads"].items():
    rows = [row for row, label in enumerate(labels) if label in words]
    if len(rows) != 1:
      raise ValueError(f"the judge's head {head!r} knows {list(labels)}; the class {name!r} fits {len(rows)} of them. "
                       "Choose a judge of these classes, or none with config.models.judge=''")
    found[head] = rows[0]
  return found


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: nnx.State, images_bhwc: jax.Array) -> dict[str, jax.Array]:
  return nnx.merge(graphdef, params)(images_bhwc)


def agreement(model: Judge, config: Mapping, names: Sequence[str], images_kmhwc: np.ndarray) -> dict[str, np.ndarray]:
  """Whether the judge sees the class that each image is meant to show.

  Args:
    config: the model's, whose "pairs" are groups of labels that captions mix up.
    names: of the classes, one for each row of images.
    images_kmhwc: uint8.

  Returns:
    booleans `[k, m]`: "exact", and "pair" with the labels of a group counted as one.
  """
  flat = images_kmhwc.reshape(-1, *images_kmhwc.shape[2:]).astype(np.float32) / 127.5 - 1
  logits, wanted = _logits(*nnx.split(model), flat), [targets(config, name) for name in names]
  exact, pair = [], []
  for head, labels in config["heads"].items():
    said_km = np.argmax(logits[head], -1).reshape(images_kmhwc.shape[:2])
    wanted_k1 = np.array([labels_of[head] for labels_of in wanted])[:, None]
    group = np.arange(len(labels))
    for mixed_up in config["pairs"]:
      members = [labels.index(label) for label in mixed_up if label in labels]
      group[members] = members[:1] * len(members)
    exact.append(said_km == wanted_k1)
    pair.append(group[said_km] == group[wanted_k1])
  return {"exact": np.all(exact, 0), "pair": np.all(pair, 0)}
