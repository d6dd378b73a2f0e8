"""Prompts: templates such as "a photo of a {name}" or "a photo of {token} {name}", and class names."""

import hashlib
import re
import string
from collections.abc import Callable, Sequence

# Sets of templates; the mean of a class's text embeddings over a set stands for the class. After CLIP's authors:
# prompts.md and the notebook on ImageNet in github.com/openai/CLIP, whose templates for birds, flowers and scenes serve
# CUB, FLO and SUN; they have none for animals.
TEMPLATES = {
  "photo": ("a photo of a {name}.",),
  "awa2": ("a photo of a {name}, a type of animal.",),
  "cub": ("a photo of a {name}, a type of bird.",),
  "flo": ("a photo of a {name}, a type of flower.",),
  "sun": ("a photo of a {name}.", "a photo of the {name}."),
  "imagenet80": (
    "a bad photo of a {name}.", "a photo of many {name}.", "a sculpture of a {name}.",
    "a photo of the hard to see {name}.", "a low resolution photo of the {name}.", "a rendering of a {name}.",
    "graffiti of a {name}.", "a bad photo of the {name}.", "a cropped photo of the {name}.", "a tattoo of a {name}.",
    "the embroidered {name}.", "a photo of a hard to see {name}.", "a bright photo of a {name}.",
    "a photo of a clean {name}.", "a photo of a dirty {name}.", "a dark photo of the {name}.",
    "a drawing of a {name}.", "a photo of my {name}.", "the plastic {name}.", "a photo of the cool {name}.",
    "a close-up photo of a {name}.", "a black and white photo of the {name}.", "a painting of the {name}.",
    "a painting of a {name}.", "a pixelated photo of the {name}.", "a sculpture of the {name}.",
    "a bright photo of the {name}.", "a cropped photo of a {name}.", "a plastic {name}.",
    "a photo of the dirty {name}.", "a jpeg corrupted photo of a {name}.", "a blurry photo of the {name}.",
    "a photo of the {name}.", "a good photo of the {name}.", "a rendering of the {name}.", "a {name} in a video game.",
    "a photo of one {name}.", "a doodle of a {name}.", "a close-up photo of the {name}.", "a photo of a {name}.",
    "the origami {name}.", "the {name} in a video game.", "a sketch of a {name}.", "a doodle of the {name}.",
    "a origami {name}.", "a low resolution photo of a {name}.", "the toy {name}.", "a rendition of the {name}.",
    "a photo of the clean {name}.", "a photo of a large {name}.", "a rendition of a {name}.",
    "a photo of a nice {name}.", "a photo of a weird {name}.", "a blurry photo of a {name}.", "a cartoon {name}.",
    "art of a {name}.", "a sketch of the {name}.", "a embroidered {name}.", "a pixelated photo of a {name}.",
    "itap of the {name}.", "a jpeg corrupted photo of the {name}.", "a good photo of a {name}.", "a plushie {name}.",
    "a photo of the nice {name}.", "a photo of the small {name}.", "a photo of the weird {name}.",
    "the cartoon {name}.", "art of the {name}.", "a drawing of the {name}.", "a photo of the large {name}.",
    "a black and white photo of a {name}.", "the plushie {name}.", "a dark photo of a {name}.", "itap of a {name}.",
    "graffiti of the {name}.", "a toy {name}.", "itap of my {name}.", "a photo of a cool {name}.",
    "a photo of a small {name}.", "a tattoo of the {name}.",
  ),
  # Of CLIP-ES (arXiv 2212.09506), chosen there by its sharpness.
  "origami": ("a clean origami {name}.",),
}
# clip/clip.py of github.com/linyq2117/TagCLIP, after that of github.com/xmed-lab/CLIP_Surgery.
TEMPLATES["tagclip85"] = (
  *TEMPLATES["imagenet80"], "there is a {name} in the scene.", "there is the {name} in the scene.",
  "this is a {name} in the scene.", "this is the {name} in the scene.", "this is one {name} in the scene.")


def prompt(template: str, name: str) -> str:
  """The template with the class name filled in.

  Raises:
    ValueError: as `check_template`; an empty name.
  """
  check_template(template)
  return template.format(name=class_name(name))


def templates(text: str, *, field: str) -> tuple[str, ...]:
  """The set of `TEMPLATES` that `text` names, or `text` itself, a template with {name}.

  Args:
    text: name or template.
    field: what the message calls it.

  Raises:
    ValueError: it is neither.
  """
  if "{" not in text:
    if text not in TEMPLATES:
      raise ValueError(f'{field} is "{text}"; it must be a template with {{name}} or one of the sets '
                       f'{", ".join(TEMPLATES)}')
    return TEMPLATES[text]
  check_template(text, field=field)
  return (text,)


def expand(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
  """Every template filled in for every name: for each name a list with a text for each template.

  Raises:
    ValueError: as `prompt`.
  """
  return [[prompt(template, name) for template in templates] for name in names]


def class_name(raw: str) -> str:
  """A name as one writes it in a sentence: underscores become spaces, runs of spaces one.

  Raises:
    ValueError: nothing is left.
  """
  name = " ".join(raw.replace("_", " ").split())
  if not name:
    raise ValueError(f"class name {raw!r} is empty; give every class a name in words")
  return name


def beside(others: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
  """Those of `others` that are not among `names`, spelt alike to CLIP, which knows no capitals."""
  alike = lambda name: class_name(name).lower()
  taken = set(map(alike, names))
  return tuple(name for name in others if alike(name) not in taken)


def slug(name: str) -> str:
  """A class name or prompt as a file name; a digest keeps apart what differs in other characters or further on."""
  plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
  return plain if plain.replace("-", " ") == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def check_template(template: str, *, token: bool = False, field: str = "prompt template") -> None:
  """Checks that a template has exactly the fields it needs, each once.

  Args:
    template: text with {name} and, if `token`, {token}.
    token: whether it is a template for class tokens.
    field: what the message calls it.

  Raises:
    ValueError: a field is missing, unknown or repeated, or braces do not match.
  """
  needed = ["name", "token"] if token else ["name"]
  try:
    found = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
  except ValueError as error:
    raise ValueError(f'{field} "{template}": {error}; braces enclose only {{name}} or '
                     "{token}") from error
  if sorted(found) != needed:
    wanted = " and ".join(f"{{{field}}}" for field in needed)
    has = ", ".join(f"{{{field}}}" for field in found) or "no field"
    raise ValueError(f'{field} "{template}" must contain {wanted} once each and nothing else in '
                     f"braces; it has {has}")


def caption(prefix: str, names: Sequence[str], fits: Callable[[str], bool]) -> str:
  """One sentence for several labels, "a photo of sky, car and road": as many as `fits` allows, the first in any case.

  Args:
    prefix: what comes before the names.
    names: at least one.
    fits: whether a text can be encoded whole.
  """
  names, text = [class_name(name) for name in names], ""
  for count in range(1, len(names) + 1):
    *others, last = names[:count]
    longer = " ".join(filter(None, (prefix, f"{', '.join(others)} and {last}" if others else last)))
    if text and not fits(longer):
      break
    text = longer
  return text
