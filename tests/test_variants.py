"""Full-size models as published: numbers of parameters, and the table in docs."""

import math
import pathlib
import re

import jax
import pytest
from flax import nnx

from digzsl_jax.models import hub
from digzsl_jax.models.variants import VARIANTS

TABLE = pathlib.Path(__file__).parent.parent / "docs" / "architectures.md"
# What each `source` says of the whole file: parameters, rounded millions (M) of them, or bytes in float32.
PUBLISHED = {
    "sd15.unet": "859520964", "sd15.text_encoder": "123060480", "sd21.unet": "865.91M", "sd21-768.unet": "865.91M",
    "sd21.text_encoder": "1.36GB", "sd.vae": "83653863", "taesd": "2445063",
    "clip-vit-b32": "151.28M", "clip-vit-b16": "149.62M", "clip-vit-l14": "427.62M", "clip-vit-l14-336": "427.94M",
    "laion-clip-vit-b32": "151.28M", "laion-clip-vit-l14": "427.62M", "laion-clip-vit-h14": "986.11M",
    "vit-b16-in21k": "346MB", "vit-l16-in21k": "1.22GB", "vit-b16": "86.6M", "vit-b32-384": "88.3M",
    "vit-l16": "304.3M", "dinov2-small": "22.1M", "dinov2-base": "86.6M", "dinov2-large": "304.4M",
    "dinov2-giant": "1136.5M", "siglip-b16": "203.16M",
}
UNITS = {"": 1, "M": 1e6, "MB": 1e6 / 4, "GB": 1e9 / 4}  # in parameters


def row(name: str) -> str:
  """A line of the table in docs/architectures.md."""
  variant = VARIANTS[name]
  count = f"{variant.parameters:,}" + (f" (+ {variant.left_out:,})" if variant.left_out else "")
  repositories = "<br>".join(f"`{repository}`" for repository in variant.hub)
  return f"| `{name}` | `{variant.model.__name__}` | {repositories} | {count} | {variant.source} |"


def test_every_variant_has_its_published_number():
  assert list(PUBLISHED) == list(VARIANTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
  variant, published = VARIANTS[name], PUBLISHED[name]
  model = hub.abstract(variant.model, variant.config, **variant.switches)
  leaves = jax.tree.leaves(nnx.state(model))
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)  # no weights were made
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  assert sum(sizes) == variant.parameters
  figure, unit = re.fullmatch(r"([\d.]+)(\w*)", published).groups()
  scale, digits = UNITS[unit], len(figure.partition(".")[2])
  assert f"{(variant.parameters + variant.left_out) / scale:.{digits}f}" == figure


def test_table_of_docs():
  rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
  assert rows == [row(name) for name in VARIANTS]
