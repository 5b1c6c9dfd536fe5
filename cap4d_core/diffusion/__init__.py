"""Multi-view diffusion: schedule, network, conditioning, sharded sampling."""
