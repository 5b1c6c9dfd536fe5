"""Animatable 4D portrait avatars in bulk: the library behind the Snakemake workflow."""

__version__ = "0.1.0"
