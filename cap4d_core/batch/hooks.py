"""What happens when a run begins and when it ends; called by the Snakefile."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from cap4d_core.batch.estimates import check_space, describe, estimate
from cap4d_core.batch.failures import end_of_run, watch_failures, write_failure_report
from cap4d_core.batch.resources import learn_resources
from cap4d_core.config import Config


def before_run(config: Config, workflow: Any) -> None:
    """Says what the run will take, and begins to note what fails.

    Args:
        config: the configuration.
        workflow: Snakemake's workflow, for the jobs that it has planned.

    Raises:
        UserError: the disk is too small by far.
    """
    watch_failures(config.results)
    jobs = planned_here(workflow)
    if not jobs:
        return
    found = estimate(config, jobs)
    _say(describe(found, config.results, gpu_limit(workflow)))
    warning = check_space(found, config.results, refuse=config.check_disk_space)
    if warning:
        _say(warning)


def planned_here(workflow: Any) -> dict[str, int]:
    """Jobs per rule of a workflow that is about to run; empty if Snakemake does not tell."""
    try:
        return dict(Counter(str(job.rule.name) for job in workflow.dag.needrun_jobs()))
    except AttributeError:  # not part of its documented interface
        return {}


def gpu_limit(workflow: Any) -> int | None:
    """How many GPU jobs may run at once."""
    try:
        limit = workflow.global_resources.get("gpu")
    except AttributeError:
        return None
    limit = getattr(limit, "value", limit)
    return limit if isinstance(limit, int) and limit > 0 else None


def after_success(config: Config) -> None:
    """Learns from the jobs of the run."""
    _learn(config)


def after_failure(config: Config) -> None:
    """Says what failed, writes the report, and learns from the jobs that went well."""
    _say(end_of_run(config))
    write_failure_report(config)
    _learn(config)


def _learn(config: Config) -> None:
    try:
        learn_resources(config.results)
    except OSError as error:  # a full disk must not hide what happened
        _say(f"Nothing was learned from this run: {error}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
