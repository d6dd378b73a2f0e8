"""Prompts: templates such as "a photo of a {name}" or "a photo of {token} {name}", and class names."""

import hashlib
import re
import string


def prompt(template: str, name: str) -> str:
  """The template with the class name filled in.

  Raises:
    ValueError: as `check_template`; an empty name.
  """
  check_template(template)
  return template.format(name=class_name(name))


def class_name(raw: str) -> str:
  """A name as one writes it in a sentence: underscores become spaces, runs of spaces one.

  Raises:
    ValueError: nothing is left.
  """
  name = " ".join(raw.replace("_", " ").split())
  if not name:
    raise ValueError(f"class name {raw!r} is empty; give every class a name in words")
  return name


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
