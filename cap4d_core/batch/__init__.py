"""What concerns many jobs at once: plans, estimates, learned resources, failures, the cache.

Light: the standard library and the configuration, because the Snakefile imports it in every job.
"""
