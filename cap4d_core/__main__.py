"""`python -m cap4d_core`: check a configuration, write its documentation, sum up results.

check     validate configuration and tables, and the files that they name; runs nothing
summary   where the results are, and their figures
schema    config.schema.json, for editors
docs      docs/configuration.md
lease     run a command on a GPU of its own
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from cap4d_core.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cap4d_core",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "summary"):
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
