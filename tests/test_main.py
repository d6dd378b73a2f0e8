"""The command line: what it refuses, and its dry run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from digzsl_jax import logs
from digzsl_jax import main as command


def test_dry_run_prints_costs_and_makes_nothing(tiny_config, tmp_path, capsys):
  command.METHODS["dig_zsl"](tiny_config.to_dict(), tmp_path, logs.Log(tmp_path), True)
  printed = capsys.readouterr().out
  for step in ("prefix", "learn", "sample", "all steps"):
    assert f"  {step}: " in printed
  assert "sd.unet" in printed and printed.count("GFLOP") == 5
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, said", [
  (["--config=configs/quickstar.py"], "error: .*No such file or directory: 'configs/quickstar.py'"),
  (["--config=configs/quickstart.py", "--config.cmd.steps=3"], "error: the config has no field 'cmd'"),
  (["--config=configs/pretrain_scenes.py", "--config.vae.training.stepss=3"],
   "error: the config has no field 'stepss'"),
  (["--config=configs/quickstart.py", "--config.tokens.stepss=3"], "error: the config has no field 'stepss'"),
  (["--config=configs/quickstart.py", "config.seed=3"], r"error: \['config.seed=3'\] not understood")])
def test_one_line_for_a_wrong_command(arguments, said, tmp_path):
  root = pathlib.Path(__file__).parent.parent
  done = subprocess.run([sys.executable, "-m", "digzsl_jax.main", f"--workdir={tmp_path}", *arguments], cwd=root,
                        capture_output=True, text=True)
  assert done.returncode == 1
  [line] = done.stderr.splitlines()
  assert re.match(said, line)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environment, devices", [
  ({}, 2), ({"JAX_NUM_CPU_DEVICES": "1"}, 1), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, 8)])
def test_a_cpu_is_two_devices_unless_told(environment, devices):
  kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
  code = "import jax; from digzsl_jax import mesh; mesh.divide_cpu(); print(jax.device_count())"
  done = subprocess.run([sys.executable, "-c", code], env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
                        cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, check=True)
  assert int(done.stdout) == devices
