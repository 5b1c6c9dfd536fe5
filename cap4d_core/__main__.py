"""`python -m cap4d_core`: check a configuration, write its documentation, sum up results.

check     validate configuration and tables, and the files that they name; runs nothing
estimate  jobs, disk and time of what is still to be run
summary   where the results are, and their figures; what failed
learn-resources
          memory and time of jobs from finished ones (every run does this at its end)
schema    config.schema.json, for editors
docs      docs/configuration.md
lease     run a command on a GPU of its own
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cap4d_core.errors import UserError

if TYPE_CHECKING:
    from cap4d_core.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cap4d_core",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "estimate", "summary", "learn-resources"):
        command = commands.add_parser(name)
        command.add_argument("--configfile", default="config.yaml")
        command.add_argument(
            "--config", nargs="*", default=[], metavar="KEY=VALUE", help="as for snakemake"
        )
    for name in ("schema", "docs"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, help="default: standard output")
    command = commands.add_parser("lease")
    command.add_argument("-n", type=int, default=1, help="GPUs")
    command.add_argument("--timeout", type=float, help="seconds to wait at most")
    command.add_argument("words", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.command == "lease":
        from cap4d_core.gpu import run_with_lease

        words = options.words[1:] if options.words[:1] == ["--"] else options.words
        if not words:
            raise UserError("lease: name a command after --")
        run_with_lease(words, options.n, options.timeout)
    if options.command in ("schema", "docs"):
        from cap4d_core import config_docs

        text = config_docs.schema() if options.command == "schema" else config_docs.reference()
        if options.output is None:
            print(text, end="")
        else:
            options.output.write_text(text, "utf-8")
        return 0

    from cap4d_core.config import load_config, load_config_file

    raw = {**load_config_file(options.configfile), **_overrides(options.config)}
    config = load_config(raw, options.configfile)
    if options.command == "estimate":
        return _estimate(config, options)
    if options.command == "learn-resources":
        from cap4d_core.batch.resources import FILE_NAME, learn_resources

        learned = learn_resources(config.results)
        print(f"{len(learned.entries)} stages learned: {Path(config.results) / FILE_NAME}")
        return 0
    if options.command == "summary":
        from cap4d_core.summary import summarise

        print(summarise(config))
        return 0

    from cap4d_core.check import check_files, describe

    print(describe(config))
    problems = check_files(config)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    print(f"{len(problems)} problem{'s' if len(problems) != 1 else ''} found")
    return 1 if problems else 0


def _estimate(config: Config, options: argparse.Namespace) -> int:
    from cap4d_core.batch import estimates

    jobs = estimates.planned_jobs(options.configfile, options.config)
    found = estimates.estimate(config, jobs)
    if not found.jobs:
        print("Nothing to be done.")
        return 0
    print(estimates.stage_table(found))
    print()
    print(estimates.describe(found, config.results))
    warning = estimates.check_space(found, config.results, refuse=config.check_disk_space)
    if warning:
        print(warning)
    return 0


def _overrides(pairs: list[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--config {pair}: must be KEY=VALUE")
        values[key] = yaml.safe_load(text)
    return values


if __name__ == "__main__":
    sys.exit(main())
