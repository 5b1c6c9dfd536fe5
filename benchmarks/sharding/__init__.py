"""What sharding of the sampling costs, measured on people of known truth (see ../README.md)."""
