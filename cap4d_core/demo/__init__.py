"""A small world with known truth: a procedural head model, subjects, images of any view."""
