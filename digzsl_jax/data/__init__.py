"""Data sets, splits, prompts and pictures; knows no model and no jax."""
