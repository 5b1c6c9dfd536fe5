"""The avatar stage: Gaussian head, its renderers, fitting."""
