"""Command line: `python -m digzsl_jax.verify --checkpoint FOLDER`; the exit status tells whether all parts agree.

Each side runs in a process of its own, so that neither sees the other's memory or threads.
"""

import argparse
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from digzsl_jax import checkpoint, cli, files
from digzsl_jax.data import tokenizer
from digzsl_jax.models import download, hub, layers
from digzsl_jax.verify import parts


def shapes(folder: pathlib.Path, size: int) -> parts.Shapes:
  """What inputs the folder's models take."""
  unet, vae = (hub.read_json(folder / part / "config.json") for part in ("unet", "vae"))
  words = tokenizer.Tokenizer.from_folder(folder / "tokenizer")
  side = size or unet["sample_size"]
  return parts.Shapes((side, side, unet["in_channels"]), 2 ** (len(vae["block_out_channels"]) - 1),
                      (words.length, unet["cross_attention_dim"]))


def run_side(module: str, *arguments: str) -> None:
  """One side as a process; what it says goes to the screen."""
  status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
  if status:
    raise ValueError(f"{module} ended with status {status}; its message stands above"
                     + (": the system ended it, perhaps for want of memory" if status < 0 else ""))


def compare(exchange: pathlib.Path, names: list[str], judged: bool) -> list[dict]:
  """A row for every part: largest answer, error over it, bound, and both sides' figures."""
  ours, theirs = (checkpoint.read_arrays(exchange / f"{side}.safetensors") for side in ("jax", "torch"))
  figures = {side: files.read_json(exchange / f"{side}.json") for side in ("jax", "torch")}
  rows = []
  for name in names:
    errors, scales = [], []
    for key in (key for key in theirs if key.partition("/")[0] == name):
      got, want = (side[key].astype(np.float64) for side in (ours, theirs))
      if got.shape != want.shape:
        raise ValueError(f"{name}: ours is {got.shape}, PyTorch's {want.shape}")
      scale = np.abs(want).max()
      # A gradient is small by nature: its error counts beside its own size.
      scales.append(scale)
      errors.append(np.abs(got - want).max() / (scale if "gradient" in name else max(scale, 1.0)))
    error = max(errors)
    rows.append({"part": name, "largest": max(scales), "error": error, "bound": parts.BOUNDS[name],
                 "agrees": bool(error <= parts.BOUNDS[name]) if judged else None,
                 **{f"{side}_{field}": figures[side][name][field] for side in ("jax", "torch")
                    for field in ("load", "first", "first_peak", "seconds", "peak")}})
  return rows


def table(rows: list[dict]) -> str:
  """The rows in Markdown."""
  lines = ["| part | largest | error | bound | | load s | first call s | GiB | call s | GiB | PyTorch s | GiB |",
           "|---|---|---|---|---|---|---|---|---|---|---|---|"]
  for row in rows:
    verdict = {True: "agrees", False: "DIFFERS", None: "not judged"}[row["agrees"]]
    lines.append(f"| {row['part']} | {row['largest']:.2g} | {row['error']:.1e} | {row['bound']:.0e} | {verdict} | "
                 f"{row['jax_load']:.1f} | {row['jax_first']:.1f} | {row['jax_first_peak']:.1f} | "
                 f"{row['jax_seconds']:.2f} | {row['jax_peak']:.1f} | {row['torch_seconds']:.2f} | "
                 f"{row['torch_peak']:.1f} |")
  return "\n".join(lines)


def verify(folder: pathlib.Path, args: argparse.Namespace, exchange: pathlib.Path) -> list[dict]:
  """Runs both sides on the same inputs and compares their answers."""
  words = tokenizer.Tokenizer.from_folder(folder / "tokenizer")
  arrays = parts.inputs(shapes(folder, args.size)) | {"ids_bl": words(parts.TEXTS[:3])}
  checkpoint.write_arrays(exchange / "inputs.safetensors", arrays)
  common = (str(folder), str(exchange), str(args.repeats))
  run_side("digzsl_jax.verify.reference", *common, *args.parts)
  run_side("digzsl_jax.verify.ours", *common, args.dtype, *args.parts)
  return compare(exchange, args.parts, judged=args.dtype == "float32")


def parser() -> argparse.ArgumentParser:
  """The flags."""
  new = argparse.ArgumentParser(prog="python -m digzsl_jax.verify", description="Compares a checkpoint's models here "
                                "with those of diffusers and transformers.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = new.add_argument
  add("--checkpoint", required=True, help="diffusers folder of Stable Diffusion 1.x/2.x, or owner/name@revision")
  add("--parts", nargs="+", choices=list(parts.BOUNDS), default=list(parts.BOUNDS), help="what to compare")
  add("--dtype", choices=layers.DTYPES, default="float32",
      help="of our computation; PyTorch's is float32, and only float32 is judged")
  add("--size", type=int, default=0, help="height and width of the latents; 0 for what the denoiser was trained on")
  add("--repeats", type=int, default=2, help="calls after the first, the quickest of which counts")
  add("--report", help="also write the table to this JSON file")
  return new


def main(arguments: Sequence[str]) -> None:
  """Compares, prints the table and ends with status 1 if a part differs."""
  args = parser().parse_args(arguments)
  absent = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
  if absent:
    sys.exit(f"error: {', '.join(absent)} not installed, which this compares with: pip install torch==2.13.0, then "
             "pip install 'digzsl_jax[oracle]'")
  with cli.answer_in_one_line("nothing was changed"), tempfile.TemporaryDirectory() as exchange:
    rows = verify(download.locate(args.checkpoint, download.STABLE_DIFFUSION), args, pathlib.Path(exchange))
    print(table(rows))
    if args.report:
      files.write_json(args.report, rows)
  if differing := [row["part"] for row in rows if row["agrees"] is False]:
    sys.exit(f"error: {', '.join(differing)} differ from PyTorch's by more than their bounds")


if __name__ == "__main__":
  main(sys.argv[1:])
