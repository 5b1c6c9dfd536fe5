"""Tables and plots of the sharding experiment: the measured part of docs/sharding.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sharding.settings import SHARDS, WHOLE

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PICTURES = "images"
SYNC_NAMES = {"none": "never", "default": "default", "every": "every step"}
# Higher is better for all of these.
COLUMNS = {
    "psnr_far": "PSNR (dB)",
    "gain_far": "above nearest reference",
    "consistency_psnr": "agreement (dB)",
    "differing_psnr": "differing error (dB)",
    "shared_psnr": "shared error (dB)",
}
INTRODUCTION = """# Shards, rounds, solver and steps

What `sampling.num_shards`, `sampling.sync_steps`, the number of steps and the number of references
do to the sampled views, measured on demo people that the network was never trained on, against true
pictures of the same views. How: `benchmarks/sharding_experiment.py`.

"""


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several, which measured other settings or other people with the same weights.

    What two parts measured of the same person in the same setting is taken from the first.

    Raises:
        SystemExit: parts of another experiment.
    """
    whole = {key: parts[0][key] for key in (*SHARED, "machine")}
    whole |= {"worlds": {}, "settings": {}}
    for part in parts:
        different = [key for key in SHARED if part[key] != whole[key]]
        if different:
            raise SystemExit(f"Results of different experiments: {', '.join(different)} differ.")
        for references, people in part["worlds"].items():
            _add_people(whole["worlds"].setdefault(references, []), people)
        for key, setting in part["settings"].items():
            found = whole["settings"].setdefault(key, {**setting, "subjects": []})
            _add_people(found["subjects"], setting["subjects"])
    whole["seeds"] = sorted({seed for part in parts for seed in part["seeds"]})
    whole["references"] = sorted({count for part in parts for count in part["references"]})
    return whole


# Equal in all parts of an experiment.
SHARED = ("format", "weights", "views", "num_views", "steps", "guidance")


def _add_people(known: list[dict[str, Any]], people: Sequence[dict[str, Any]]) -> None:
    by_seed = {person["seed"]: person for person in known}
    for person in people:
        if person["seed"] not in by_seed:
            known.append(dict(person))
            continue
        mine = by_seed[person["seed"]]
        mine |= {key: value for key, value in person.items() if key not in mine}
    known.sort(key=lambda person: person["seed"])


class Results:
    """Settings of the experiment, looked up by what they are."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        everything: list[dict[str, Any]] = list(content["settings"].values())
        # Guided in a part of the steps only: a table of their own.
        self.partly_guided = [s for s in everything if tuple(s.get("interval", WHOLE)) != WHOLE]
        self.settings = [s for s in everything if s not in self.partly_guided]

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The setting with these values; what is not named is as usual."""
        usual = {
            "steps": self.content["steps"],
            "guidance": self.content["guidance"],
            "solver": "ddim",
            "sync": "none",
        }
        for setting in self.settings:
            if all(setting[key] == value for key, value in (usual | wanted).items()):
                return setting
        return None

    @property
    def references(self) -> list[int]:
        """Numbers of references."""
        return [int(count) for count in self.content["references"]]

    def base(self, references: int) -> dict[str, Any] | None:
        """The published algorithm: one shard, everything as usual."""
        return self.find(references=references, shards=1)


def values(setting: dict[str, Any], name: str) -> np.ndarray:
    """A figure of every subject, NaN where there is none."""
    found = [subject.get(name) for subject in setting["subjects"]]
    return np.array([np.nan if value is None else value for value in found], np.float64)


def mean_text(setting: dict[str, Any], name: str) -> str:
    """Mean over the subjects."""
    found = values(setting, name)
    return f"{np.nanmean(found):.2f}" if np.isfinite(found).any() else "–"


def difference(
    setting: dict[str, Any], base: dict[str, Any], name: str
) -> tuple[float, float] | None:
    """Mean difference over the subjects, and its standard error."""
    paired = values(setting, name) - values(base, name)
    paired = paired[np.isfinite(paired)]
    if not len(paired):
        return None
    error = float(paired.std(ddof=1) / np.sqrt(len(paired))) if len(paired) > 1 else float("nan")
    return float(paired.mean()), error


def difference_text(setting: dict[str, Any], base: dict[str, Any] | None, name: str) -> str:
    """Difference to another setting as `-0.12 ± 0.03`."""
    if base is None or setting is base:
        return ""
    found = difference(setting, base, name)
    if found is None:
        return ""
    return f" ({found[0]:+.2f}" + (f" ± {found[1]:.2f})" if np.isfinite(found[1]) else ")")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; empty without rows."""
    listed = [list(row) for row in rows]
    if not listed:
        return "Not measured.\n"
    head = list(header)
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *listed)]
    return "\n".join(lines) + "\n"


def figures(
    setting: dict[str, Any], base: dict[str, Any] | None, names: Iterable[str]
) -> list[str]:
    """Cells of one row: means, and differences to the base."""
    return [mean_text(setting, n) + difference_text(setting, base, n) for n in names]


def shards_table(results: Results, references: int) -> str:
    """Shards and rounds."""
    base = results.base(references)
    rows = []
    settings = [(s, sync) for s in SHARDS for sync in SYNC_NAMES if s > 1 or sync == "none"]
    for shards, sync in [*settings, (0, "none")]:
        setting = results.find(references=references, shards=shards, sync=sync)
        if setting is None:
            continue
        name = "every call on its own" if shards == 0 else str(shards)
        anew = "never" if shards == 0 else "–" if shards == 1 else SYNC_NAMES[sync]
        cells = figures(setting, base, COLUMNS)
        rows.append([name, anew, *cells, *figures(setting, base, ["avatar_psnr"])])
    return table(["shards", "dealt anew", *COLUMNS.values(), "avatar (dB)"], rows)


def steps_table(results: Results) -> str:
    """Solver and number of steps, against the longest run of ddim."""
    few = results.references[0]
    found = [
        s
        for s in results.settings
        if (s["references"], s["shards"], s["guidance"]) == (few, 1, results.content["guidance"])
    ]
    found.sort(key=lambda s: (s["solver"] != "ddim", s["solver"], s["steps"]))
    longest = max(
        (s for s in found if s["solver"] == "ddim"), key=lambda s: s["steps"], default=None
    )
    rows = [
        [s["solver"], str(s["steps"]), *figures(s, longest, COLUMNS), f"{s['seconds']:.1f}"]
        for s in found
    ]
    return table(["solver", "steps", *COLUMNS.values(), "seconds"], rows)


def guidance_table(results: Results, references: int) -> str:
    """Classifier-free guidance at one shard."""
    base = results.base(references)
    found = [
        s
        for s in results.settings
        if (s["references"], s["shards"], s["steps"], s["solver"])
        == (references, 1, results.content["steps"], "ddim")
    ]
    found.sort(key=lambda s: s["guidance"])
    rows = [[f"{s['guidance']:g}", *figures(s, base, COLUMNS)] for s in found]
    return table(["guidance", *COLUMNS.values()], rows)


def interval_table(results: Results, references: int) -> str:
    """Guidance in a part of the steps, and how many half calls it leaves out."""
    base = results.base(references)
    found = [s for s in results.partly_guided if s["references"] == references]
    rows = []
    for setting in [*([base] if base else []), *found] if found else []:
        first, end = setting.get("interval", WHOLE)
        work = f"{(1 + end - first) / 2:.0%}"
        rows.append([f"{first:g} to {end:g}", work, *figures(setting, base, COLUMNS)])
    return table(["guided steps", "work", *COLUMNS.values()], rows)


def world_table(results: Results) -> str:
    """What the figures are to be read against."""
    rows = []
    for references in results.references:
        people = results.content["worlds"].get(f"refs{references}")
        if not people:
            continue

        def mean(pick: Callable[[dict[str, Any]], float | None], of: Any = people) -> str:
            found = [v for v in map(pick, of) if v is not None]
            return f"{np.mean(found):.2f}" if found else "–"

        rows.append(
            [
                str(references),
                mean(lambda p: p["mean_angle_deg"]),
                mean(lambda p: p["nearest_reference_far"]),
                mean(lambda p: p["autoencoder"]["psnr_far"]),
                mean(lambda p: p["truth"]["consistency_psnr"]),
                mean(lambda p: p["autoencoder"]["consistency_psnr"]),
                mean(lambda p: p["autoencoder"]["differing_psnr"]),
            ]
        )
    header = [
        "references", "angle to the nearest (°)", "nearest reference (dB)", "autoencoder (dB)",
        "agreement of the truth (dB)", "agreement, autoencoder (dB)", "differing, autoencoder (dB)",
    ]  # fmt: skip
    return table(header, rows)


def measured_text(results: Results, has_views: bool) -> str:
    """The measured part of the page."""
    content = results.content
    parts = [
        f"{len(content['seeds'])} people (numbers {min(content['seeds'])} to "
        f"{max(content['seeds'])}), {content.get('num_views', content['views'])} views each, "
        f"{content['steps']} steps of DDIM and guidance {content['guidance']:g} where nothing else "
        f"is said; {content['machine']}. Means over people; in brackets the difference to the line "
        "it is compared with (one shard, or the most steps) and the standard error of that "
        "difference over the people. Higher is better everywhere.\n",
        "What to read the figures against:\n",
        world_table(results),
    ]
    for references in results.references:
        parts += [f"### Shards and rounds, {references} reference(s)\n"]
        parts += [shards_table(results, references)]
    parts += [f"![Shards and rounds]({PICTURES}/sharding_shards.png)\n"]
    if len(results.references) > 1:
        parts += ["### References, one shard\n", references_table(results)]
    parts += ["### Solver and steps\n", steps_table(results)]
    parts += [f"![Solver and steps]({PICTURES}/sharding_steps.png)\n"]
    for references in results.references:
        parts += [f"### Guidance, {references} reference(s)\n", guidance_table(results, references)]
    if results.partly_guided:
        for references in results.references:
            parts += [f"### Guidance in a part of the steps, {references} reference(s)\n"]
            parts += [interval_table(results, references)]
    if has_views:
        parts += [
            f"### Views of person {content['seeds'][0]}\n",
            f"A reference, then views.\n\n![Views]({PICTURES}/sharding_views.png)\n",
        ]
    return "\n".join(parts)


def references_table(results: Results) -> str:
    """More references against the fewest."""
    base = results.base(results.references[0])
    found = [(count, results.base(count)) for count in results.references]
    rows = [[str(count), *figures(s, base, COLUMNS)] for count, s in found if s is not None]
    return table(["references", *COLUMNS.values()], rows)


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Results of one or several files."""
    return merged([json.loads(path.read_text("utf-8")) for path in paths])


def write_report(paths: Sequence[Path], docs: Path, pictures: Path | None) -> None:
    """Writes plots, and the measured part of docs/sharding.md between its markers.

    Args:
        paths: results; of several runs of the experiment if settings or people were shared out.
        docs: folder of the documentation.
        pictures: folder with the rows of views; None = show none.
    """
    from benchmarks.sharding.plots import plot_shards, plot_steps, write_views

    results = Results(read_results(paths))
    (docs / PICTURES).mkdir(parents=True, exist_ok=True)
    plot_shards(results, docs / PICTURES / "sharding_shards.png")
    plot_steps(results, docs / PICTURES / "sharding_steps.png")
    has_views = pictures is not None and write_views(
        results, pictures, docs / PICTURES / "sharding_views.png"
    )
    page = docs / "sharding.md"
    text = page.read_text("utf-8") if page.exists() else f"{INTRODUCTION}{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page}: no lines '{BEGIN}' and '{END}' to write between.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(
        f"{before}{BEGIN}\n\n{measured_text(results, has_views)}\n{END}{after}", "utf-8"
    )
    print(f"Wrote {page}")
