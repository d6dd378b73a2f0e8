"""Times of production's compiled steps on random weights: what a token update, a picture, a feature row cost here.

Command: python -m digzsl_jax.main --config=configs/bench.py --workdir=runs/bench [--config.bench.compare=torch]
Took: five minutes on two CPU cores that others used, without a peer and a second start (jax 0.10.2).
Result: bench.jsonl, a line for each bench; `python -m digzsl_jax.report --bench runs/bench/bench.jsonl` makes a table,
  docs/benchmarks_speed.md has some. `--config.stages=tokens,unet` chooses, `--config.bench.sizes=full` is SD 1.5, 2.1.
"""

from configs import base


def get_config():
  return base.bench()
