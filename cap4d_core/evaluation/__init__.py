"""Measured quality of views and avatars."""
