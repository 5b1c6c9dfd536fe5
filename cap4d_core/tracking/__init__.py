"""Fits of the head model to photos and video."""
