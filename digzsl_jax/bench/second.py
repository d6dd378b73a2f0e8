"""A second start: the first call of a bench in a process that finds compiled programs in the cache.

`second SPEC` prints a JSON line; `SPEC` is a JSON object of the bench, its size and its place.
"""

import json
import sys

import jax

from digzsl_jax import cli, mesh
from digzsl_jax.bench import measure, sizes, steps


def main() -> None:
  cli.start()
  spec = json.loads(sys.argv[1])
  if spec["precision"]:
    jax.config.update("jax_default_matmul_precision", spec["precision"])
  size = sizes.SIZES[spec["size"]]()
  place = sizes.Place(size, sizes.Models(size, spec["dtype"]), mesh.make(spec["devices"]), spec["batch"], spec["steps"])
  _, _, first = measure.first_call(steps.BENCHES[spec["bench"]](place))
  print(json.dumps(first._asdict()), flush=True)


if __name__ == "__main__":
  main()
