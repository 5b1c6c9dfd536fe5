"""Driving an avatar: rendering, video and 3D export."""
