"""What the stages of every multi-label method share: the data set and CLIP.

Shapes: n image, k label.
"""

import functools
from collections.abc import Mapping
from types import ModuleType

from digzsl_jax.base_workspace import EMBEDDED, BaseWorkspace
from digzsl_jax.data import multilabel


class MultilabelWorkspace(BaseWorkspace):
  """A method's own adds what `BaseWorkspace` asks for beside this."""

  def admit(self, asked: Mapping[str, ModuleType]) -> None:
    """Raises ValueError if these stages need a checkpoint that is not named."""
    if not self.models.clip:
      raise ValueError("config.models.clip is empty; its text tower embeds labels")

  def needs(self, module: ModuleType) -> tuple[str, ...]:
    return module.NEEDS

  @property
  def model_names(self) -> dict[str, str]:
    return {"models.clip": self.models.clip}

  @functools.cached_property
  def data_fingerprint(self) -> str:
    """Short SHA-256 of names, lists, targets and images."""
    return multilabel.fingerprint(self.dataset)[:16]

  @functools.cached_property
  def dataset(self) -> multilabel.MultilabelDataset:
    """The data set of the config, whose counts and notes go to the log."""
    dataset = multilabel.load(self.config["data"])
    for line in (multilabel.summary(dataset), *dataset.notes):
      self.log.say(line)
    return dataset

  @property
  def foreign_models(self) -> list[str]:
    """Checkpoints of a small world that know nothing of these labels."""
    name = self.models.clip
    foreign = name.startswith(EMBEDDED) and not name.removeprefix(EMBEDDED).startswith(self.config["data"]["name"])
    return [name] if foreign else []

  @property
  def warnings(self) -> list[str]:
    """What makes the numbers of this run mean less than they seem to."""
    said = ("learnt from a small world and knows nothing of these labels: the numbers below mean nothing. What a run "
            "with it shows is that data, counts and stages fit together.")
    return [f"{name} {said}" for name in self.foreign_models]
