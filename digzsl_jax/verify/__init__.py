"""Compares a checkpoint's models here with PyTorch's: `python -m digzsl_jax.verify --checkpoint FOLDER`."""
