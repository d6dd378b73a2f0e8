"""Times the compiled steps of production: `--config=configs/bench.py`, or `python -m digzsl_jax.bench` where
`ml_collections` is absent."""
