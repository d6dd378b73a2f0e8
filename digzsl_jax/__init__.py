"""Zero-shot recognition with Stable Diffusion and CLIP in Flax NNX."""

__version__ = "0.1.0"
