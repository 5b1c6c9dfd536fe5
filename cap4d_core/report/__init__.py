"""The overview page of all results."""
