"""Rotations, cameras, crops and mesh rasterization."""
