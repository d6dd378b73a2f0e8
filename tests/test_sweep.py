"""Sweeps: which command lines, and the table over what they left."""

import json
import subprocess
import sys

import pytest

from launch import sweep

SETTINGS = ["--set", "tokens.gradient=x0,last", "--set", "seed=0,1,2"]


def test_commands_are_printed_and_nothing_is_run(tmp_path, capsys):
  assert sweep.main(["--config=configs/quickstart.py", f"--out={tmp_path / 'sweep'}", *SETTINGS]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(set(lines)) == 6
  assert lines[1].endswith(f"-m digzsl_jax.main --config=configs/quickstart.py "
                           f"--workdir={tmp_path}/sweep/tokens.gradient=x0,seed=1 "
                           "--config.tokens.gradient=x0 --config.seed=1")
  assert not list(tmp_path.iterdir())


def test_table_averages_seeds_and_groups_the_rest(tmp_path, capsys):
  for gradient, accuracies in (("x0", (50.0, 60.0, 70.0)), ("last", (40.0,))):
    for seed, accuracy in enumerate(accuracies):
      folder = tmp_path / f"tokens.gradient={gradient},seed={seed}"
      folder.mkdir()
      results = {"czsl": {"T1": accuracy}, "baselines": {"plain_sd": {"czsl": {"T1": accuracy - 10}}}}
      (folder / "results.json").write_text(json.dumps(results))
  assert sweep.main(["--config=c.py", f"--out={tmp_path}", "--table", *SETTINGS]) == 0
  assert capsys.readouterr().out.splitlines() == [
      "| settings | runs | T1 | plain SD T1 |",
      "| --- | --- | --- | --- |",
      "| tokens.gradient=x0 | 3 | 60.0 ± 10.0 | 50.0 ± 10.0 |",
      "| tokens.gradient=last | 1 | 40.0 | 30.0 |"]


def test_a_failed_run_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
  def run(line, check):
    if f"--workdir={tmp_path}/seed=0" in line:
      return subprocess.CompletedProcess(line, 1)
    (tmp_path / "seed=1").mkdir()
    (tmp_path / "seed=1" / "results.json").write_text('{"gzsl": {"H": 12.34}}')
    return subprocess.CompletedProcess(line, 0)

  monkeypatch.setattr(subprocess, "run", run)
  assert sweep.main(["--config=c.py", f"--out={tmp_path}", "--run", "--set", "seed=0,1"]) == 1
  captured = capsys.readouterr()
  assert captured.out.splitlines()[-1] == "| as configured | 1 | 12.3 |"
  assert captured.err == f"failed: {tmp_path}/seed=0\n"


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
