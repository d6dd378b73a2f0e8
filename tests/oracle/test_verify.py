"""`python -m digzsl_jax.verify`: agreement on a shipped world, and a difference that it must not pass over."""

import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("diffusers")

from digzsl_jax import checkpoint, files
from digzsl_jax.verify import __main__ as verify
from digzsl_jax.verify import parts

SD = pathlib.Path(checkpoint.__file__).parent / "worlds" / "scenes" / "sd"


@pytest.mark.slow
def test_a_shipped_world_agrees(tmp_path, capfd):
  report = tmp_path / "report.json"
  verify.main(["--checkpoint", str(SD), "--repeats", "0", "--report", str(report)])
  rows = json.loads(report.read_text())
  assert [row["part"] for row in rows] == list(parts.BOUNDS)
  assert all(row["agrees"] and row["largest"] > 0 and row["torch_peak"] > 0.1 for row in rows)
  assert capfd.readouterr().out.count("| agrees |") == len(rows)


@pytest.fixture
def sides(monkeypatch):
  """In place of both processes: `sides(**{part: error})` adds errors to the answers of ours."""
  def fake(**errors):
    def run_side(module, folder, exchange, repeats, *rest):
      side = {"digzsl_jax.verify.reference": "torch", "digzsl_jax.verify.ours": "jax"}[module]
      names = rest if side == "torch" else rest[1:]
      off = errors if side == "jax" else {}
      checkpoint.write_arrays(pathlib.Path(exchange) / f"{side}.safetensors",
                              {f"{name}/answer": np.array([0.5, -2.0 + off.get(name, 0)]) for name in names})
      figures = dict(load=1.0, first=2.0, first_peak=3.0, seconds=1.0, peak=3.0)
      files.write_json(pathlib.Path(exchange) / f"{side}.json", dict.fromkeys(names, figures))
    monkeypatch.setattr(verify, "run_side", run_side)
  return fake


def test_a_difference_ends_with_its_name(sides, capsys):
  sides(unet=3e-5, text=1.9e-5)
  with pytest.raises(SystemExit, match="error: unet differ"):
    verify.main(["--checkpoint", str(SD), "--parts", "text", "unet"])  # errors count over the largest answer, 2
  assert "| unet | 2 | 1.5e-05 | 1e-05 | DIFFERS |" in capsys.readouterr().out


def test_other_types_are_not_judged(sides, capsys):
  sides(unet=1e-2)
  verify.main(["--checkpoint", str(SD), "--parts", "unet", "--dtype", "bfloat16"])
  assert "| not judged |" in capsys.readouterr().out


def test_a_side_that_fails_ends_in_one_line():
  with pytest.raises(SystemExit, match="error: there is no folder"):
    verify.main(["--checkpoint", "./nowhere"])
  with pytest.raises(ValueError, match="digzsl_jax.verify.ours ended with status 1"):
    verify.run_side("digzsl_jax.verify.ours", str(SD), "nowhere", "0", "float32", "text")
