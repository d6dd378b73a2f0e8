"""Sweeps and studies: which command lines, and the table over what they left."""

import ast
import json
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart
from digzsl_jax import base_workspace, decoder_workspace, diffusion, files, main, tag_workspace, workspace
from digzsl_jax.runs import class_tokens
from launch import sweep

SCHEDULE = diffusion.Schedule.from_config({"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False})
SETTINGS = ["--set", "tokens.gradient=x0,last", "--set", "seed=0,1,2"]


def test_commands_are_printed_and_nothing_is_run(tmp_path, capsys):
  assert sweep.main(["--config=configs/quickstart.py", f"--out={tmp_path / 'sweep'}", *SETTINGS]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(set(lines)) == 6
  assert lines[1].endswith(f"-m digzsl_jax.main --config=configs/quickstart.py "
                           f"--workdir={tmp_path}/sweep/tokens.gradient=x0,seed=1 "
                           "--config.tokens.gradient=x0 --config.seed=1")
  assert not list(tmp_path.iterdir())


def finished_run(folder, t1, **changes):
  config = quickstart.get_config().to_dict() | changes
  files.write_json(folder / "config.json", config)
  files.write_json(folder / "results.json", {"dataset": "scenes", "czsl": {"T1": t1}})


def test_table_is_that_of_the_merged_report_over_these_runs_alone(tmp_path, capfd):
  for seed, t1 in enumerate((50.0, 60.0, 70.0)):
    finished_run(tmp_path / f"seed={seed}", t1, seed=seed)
  finished_run(tmp_path / "seed=3", 90.0, seed=3)
  assert sweep.main(["--config=c.py", f"--out={tmp_path}", "--table", "--set", "seed=0,1,2"]) == 0
  captured = capfd.readouterr()
  assert "| as configured | 3 | 60.0 ± 10.0 |" in captured.out and not captured.err
  assert "60.0 &#177; 10.0" in (tmp_path / "merged_report.html").read_text()
  assert sweep.main(["--config=c.py", f"--out={tmp_path}", "--table", "--set", "seed=0,7"]) == 1
  captured = capfd.readouterr()
  assert "| as configured | 1 | 50.0 |" in captured.out
  assert captured.err == f"left out: there is no run in {tmp_path}/seed=7\n"


def test_a_failed_run_does_not_stop_the_others(tmp_path, capfd, monkeypatch):
  really_run = subprocess.run

  def run(line, check):
    if "digzsl_jax.main" not in line:
      return really_run(line, check=check)
    if f"--workdir={tmp_path}/seed=0" in line:
      return subprocess.CompletedProcess(line, 1)
    finished_run(tmp_path / "seed=1", 12.34, seed=1)
    return subprocess.CompletedProcess(line, 0)

  finished_run(tmp_path / "seed=0", 99.0, seed=0)  # of an earlier attempt
  monkeypatch.setattr(subprocess, "run", run)
  assert sweep.main(["--config=c.py", f"--out={tmp_path}", "--run", "--set", "seed=0,1"]) == 1
  captured = capfd.readouterr()
  assert "| as configured | 1 | 12.3 |" in captured.out
  assert captured.err == f"failed: {tmp_path}/seed=0\n"


CONFIGS = {"configs/quickstart.py": "dig_zsl", "configs/cub.py": "dig_zsl",
           "configs/quickstart_clip_decoder.py": "clip_decoder", "configs/nus_wide.py": "clip_decoder",
           "configs/quickstart_tagclip.py": "tagclip"}
MODELS = {"dig_zsl": workspace.ModelSettings, "clip_decoder": decoder_workspace.ModelSettings,
          "tagclip": tag_workspace.ModelSettings}


def commands(capsys, *arguments):
  """The printed command lines, without the program."""
  assert sweep.main(list(arguments)) == 0
  return [shlex.split(line)[3:] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_run_of_every_study_is_legal(config, capsys, monkeypatch):
  lines = commands(capsys, f"--config={config}", "--study=all")
  changed = set()
  for line in lines:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr(sys, "argv", ["main", *line])  # where config_flags looks for what is overridden
    values(sys.argv)
    found = values.config.to_dict()
    base_workspace.parse(MODELS[found["method"]], found["models"], "models")
    for name, module in main.STAGED[found["method"]][0].items():
      settings = base_workspace.parse(module.Settings, found[name], name)
      if name == "tokens":
        class_tokens.gradient_path(settings, SCHEDULE)
    changed.add(json.dumps(found, sort_keys=True))
  assert len(changed) == len(lines)  # each another one, the config itself among them


@pytest.mark.parametrize("config, study", [(config, study) for config, method in CONFIGS.items()
                                           for study in sweep.STUDIES[method]])
def test_a_study_varies_one_factor(config, study, capsys):
  lines = commands(capsys, f"--config={config}", f"--study={study}", "--set=data.seed=3")
  assert all("--config.data.seed=3" in line for line in lines) and len(lines) >= 2
  assert [word for word in lines[0] if word.startswith("--config.")] == ["--config.data.seed=3"]
  assert sum("," in setting for setting in sweep.STUDIES[CONFIGS[config]][study]) == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_values_are_written_as_the_config_prints_them(config):
  defaults = sweep.config_values(config)
  for settings in sweep.STUDIES[CONFIGS[config]].values():
    for field, value in ((field, value) for one in sweep.combinations(settings) for field, value in one.items()):
      kind = type(ast.literal_eval(defaults[field])) if defaults[field][0] in "0123456789TF" else str
      assert str(ast.literal_eval(value) if kind is not str else value) == value
      assert kind is str or type(ast.literal_eval(value)) is kind


def test_studies_go_around_what_is_set_and_share_runs(capsys):
  lines = commands(capsys, "--config=configs/quickstart.py", "--out=o", "--study=guide", "--study=noise",
                   "--study=seeds", "--set=seed=0,1", "--set=tokens.noise_period=5")
  folders = [line[1].removeprefix("--workdir=o/").replace("tokens.", "") for line in lines]
  assert folders == [
      f"seed={seed},noise_period={noise}{guide}"
      for seed, noise, guide in ((0, 5, ""), (0, 5, ",guide=clip"), (0, 0, ""), (0, 1, ""), (1, 5, ""), (2, 5, ""),
                                 (1, 5, ",guide=clip"), (1, 0, ""), (1, 1, ""))]


def test_a_template_reaches_the_run_whole(capsys):
  lines = commands(capsys, "--config=configs/nus_wide.py", "--study=template")
  assert [line[2:] for line in lines] == [[], *([f"--config.models.template={template}"] for template in (
      "{name}", "a photo of a {name}", "imagenet80"))]


@pytest.mark.parametrize("config, study, said", [
    ("quickstart", "colour", "--study colour: configs of method dig_zsl have the studies ['guide', "),
    ("quickstart", "alpha", "--study alpha: configs of method dig_zsl have the studies ['guide', "),
    ("quickstart_clip_decoder", "gamma", "--study gamma: configs of method clip_decoder have the studies ['alpha', "),
    ("pretrain_scenes", "all", "--study all: configs of method pretrain have the studies []"),
    ("none", "gamma", "configs/none.py")])
def test_a_study_that_is_none(config, study, said, capsys):
  with pytest.raises(SystemExit):
    sweep.main([f"--config=configs/{config}.py", f"--study={study}"])
  assert said in capsys.readouterr().err


@pytest.mark.parametrize("settings", [["seed"], ["seed="], ["=1"], ["seed=1,,2"], ["seed=1,1"],
                                      ["seed=1", "config.seed=2"]])
def test_bad_settings(settings, capsys):
  with pytest.raises(SystemExit):
    sweep.main(["--config=c.py", *(word for setting in settings for word in ("--set", setting))])
  assert f"--set {settings[-1]}: " in capsys.readouterr().err


def test_runs_as_a_script(tmp_path):
  line = [sys.executable, sweep.__file__, "--config=c.py", f"--out={tmp_path}", "--set", "name=a b"]
  shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
  assert f"--workdir={tmp_path}/name=ab '--config.name=a b'" in shown
