"""Training of the multi-view diffusion model and of its autoencoder."""
