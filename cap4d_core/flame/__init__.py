"""The FLAME-format morphable head model."""
