"""The command line's dry run."""

import pytest

from digzsl_jax import logs
from digzsl_jax import main as command


@pytest.mark.slow
def test_dry_run_prints_costs_and_makes_nothing(tiny_config, tmp_path, capsys):
  command.dig_zsl(tiny_config.to_dict(), tmp_path, logs.Log(tmp_path), True)
  printed = capsys.readouterr().out
  for step in ("prefix", "learn", "sample", "all steps"):
    assert f"  {step}: " in printed
  assert "sd.unet" in printed and printed.count("GFLOP") == 5
  assert not list(tmp_path.iterdir())
