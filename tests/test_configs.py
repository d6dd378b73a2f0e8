"""Every config loads, refuses unknown fields, and says what the code that reads it understands."""

import importlib
import inspect
import pathlib
from collections.abc import Mapping

import pytest
from ml_collections import config_dict

from digzsl_jax import base_workspace, decoder_workspace, loop, main, stages, tag_workspace, workspace
from digzsl_jax.data import datasets, multilabel
from digzsl_jax.runs import pretrain

ROOT = pathlib.Path(__file__).parent.parent
FREE = {"data", "judge.model.heads"}  # replaced whole: what is legal depends on the world
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "base")


def load(name: str) -> config_dict.ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config()


def sections(config: Mapping, prefix: str = ""):
  """`(dotted name, section)` of the config itself and of everything below it."""
  yield prefix, config
  for name, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      yield from sections(value, f"{prefix}.{name}".lstrip("."))


@pytest.mark.parametrize("name", NAMES)
def test_no_field_can_be_invented(name):
  for where, section in sections(load(name)):
    if where not in FREE:
      with pytest.raises(AttributeError, match="typo"):
        section.typo = 1


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).method in main.STAGED])
def test_sections_fit_their_settings(name):
  config = load(name).to_dict()
  known, kind = main.STAGED[config["method"]]
  assert set(config) == stages.SHARED | set(known)
  assert set(config["stages"]) <= set(known)
  settings = {workspace.Workspace: workspace.ModelSettings,
              decoder_workspace.DecoderWorkspace: decoder_workspace.ModelSettings,
              tag_workspace.TagWorkspace: tag_workspace.ModelSettings}[kind]
  base_workspace.parse(settings, config["models"], "models")
  for section, module in known.items():
    base_workspace.parse(module.Settings, config[section], section)


@pytest.mark.parametrize("name", [name for name in NAMES if "data" in load(name)])
def test_data_fits_its_loader(name):
  arguments, several = load(name).data.to_dict(), load(name).method != "dig_zsl"
  loader = (multilabel if several else datasets).LOADERS[arguments["name"]]
  assert set(arguments) - {"name"} <= set(inspect.signature(loader).parameters)


def test_nus_wide_fits_both_its_loaders():
  """The config names the other one as a way to ML-Decoder's protocol."""
  fields = set(load("nus_wide").data) - {"name"}
  assert fields <= set(inspect.signature(multilabel.LOADERS["nus_wide_csv"]).parameters)


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).method == "pretrain"])
def test_pretraining_fits(name):
  config = load(name).to_dict()
  assert set(config["stages"]) <= set(pretrain.PARTS) <= set(config)
  for section in config.values():
    if isinstance(section, dict) and "training" in section:
      loop.Training(**section["training"])
