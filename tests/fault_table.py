"""The table of faults in docs/reliability.md, written from what the tests saw.

    pytest tests/slurm tests/faults tests/workflow --fault-table docs/reliability.md

replaces the rows of the faults that were tested; the others stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- fault table -->", "<!-- end of fault table -->"
HEADER = "| fault | what was lost | back to work after | what to do |\n|---|---|---|---|"
# Rows in the order of the table.
FAULTS = (
    "node dies in the middle of a shard",
    "job is preempted and queued again",
    "time limit comes near",
    "out of memory",
    "Snakemake is killed (SIGKILL), cluster jobs go on",
    "Snakemake is killed (SIGKILL), local jobs go on",
    "disk full during a write",
    "crash leaves a truncated output",
    "crash leaves a truncated checkpoint",
    "two runs in one folder",
    "two runs of different folders, one results folder",
    "files appear late (slow network disk)",
    "clocks of nodes are wrong",
    "file in the cache is damaged",
    "one bad subject of ten",
)


@dataclass(frozen=True)
class Row:
    """One fault as it was seen."""

    fault: str
    lost: str
    recovery: str
    action: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.lost} | {self.recovery} | {self.action} |"


def update_table(path: Path, rows: list[Row]) -> None:
    """Replaces the rows of the given faults between the markers of a Markdown file."""
    unknown = {row.fault for row in rows} - set(FAULTS)
    if unknown:
        raise ValueError(f"not in tests/fault_table.py: {', '.join(sorted(unknown))}")
    text = path.read_text("utf-8")
    before, found, rest = text.partition(BEGIN)
    table, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{path}: no {BEGIN} ... {END}")
    lines = {fault: line for line in table.splitlines() for fault in FAULTS
             if re.match(rf"\| {re.escape(fault)} \|", line)}  # fmt: skip
    lines |= {row.fault: str(row) for row in rows}
    body = "\n".join([HEADER, *(lines[fault] for fault in FAULTS if fault in lines)])
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", "utf-8")
