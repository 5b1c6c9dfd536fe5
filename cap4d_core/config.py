"""The configuration: config.yaml, its tables, presets and the command line, checked as one.

Light: standard library, pydantic and PyYAML; no file but the configuration and its tables is read,
because every cluster job does this again. `python -m cap4d_core check` looks at the files named.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from cap4d_core.diffusion.round_plan import round_steps
from cap4d_core.diffusion.step_grid import ddim_step_count
from cap4d_core.errors import ConfigError, UserError
from cap4d_core.messages import describe_error
from cap4d_core.settings import PRESETS, StrictModel, SubjectSettings
from cap4d_core.subjects import (
    DEMO_PREFIX,
    DRIVING_PATHS,
    SUBJECT_PATHS,
    Driving,
    Subject,
    parse_row,
    read_rows,
    read_table,
    resolve_path,
    row_problems,
)

QualityPreset = Literal["demo", "debug", "low", "medium", "default", "high"]
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"})
# Settings that hold paths: variables are expanded, relative ones taken from the config file.
PATH_SETTINGS = (
    ("head_model", "path"),
    ("head_model", "companions"),
    ("tracking", "pixel3dmm_path"),
    ("tracking", "networks"),
    ("mmdm", "path"),
    ("sampling", "plan"),
    ("fitting", "lpips_weights"),
    ("evaluation", "identity_model"),
)
# Words with a meaning of their own where a path is expected.
PATH_WORDS = frozenset({"auto", "demo"})
# Fetched by a rule; a folder of this name is written ./download.
DOWNLOAD = LPIPS_DOWNLOAD = "download"
DOWNLOADED_PATHS = frozenset(
    {
        ("head_model", "path"),
        ("head_model", "companions"),
        ("tracking", "networks"),
        ("fitting", "lpips_weights"),
    }
)
URL_SETTINGS = (
    ("mmdm", "url"),
    ("mmdm", "config_url"),
    ("fitting", "lpips_url"),
    ("head_model", "url"),
    ("head_model", "companions_url"),
    ("tracking", "networks_url"),
)
# Light copy of the rule of `cap4d_core.download`, which each job would have to import otherwise.
_DOWNLOADABLE = re.compile(r"https://[^/\s]+/\S+|http://(localhost|127\.[\d.]+|\[::1\])(:\d+)?/\S+")
DEFAULT_HEAD_MODEL = "assets/flame"
DEFAULT_WEIGHTS = "assets/mmdm"
DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


class ConfigFile(SubjectSettings):
    """What config.yaml and `--config` may hold."""

    results: str = Field(
        "results", min_length=1, description="Folder of everything that is made, logs included."
    )
    quality: QualityPreset = Field(
        "default", description="Preset of the sampling and fitting settings; single keys override."
    )
    subjects: str | None = Field(None, description="Table of subjects (.tsv).")
    driving: str | None = Field(
        None,
        description="Table of driving sequences (.tsv); or, for a single run, a video, a ready "
        "fit.npz, a folder with fit.npz and a camera path, or `demo`.",
    )
    animations: str | list[str] = Field(
        "all",
        description="Which avatar is driven by which sequence: 'all', a list of "
        "'subject:driving' patterns with * and ?, or a table (.tsv) with both columns.",
    )
    subject: str | None = Field(
        None,
        description="A single run instead of the table of subjects: photos, a video, the folder of "
        "a ready fit or avatar, or `demo:SEED`. Meant for the command line: starts at the working "
        "directory.",
    )
    keep_intermediates: bool = Field(
        False,
        description="Keep the latents of every sampling round, which are deleted otherwise as soon "
        "as nothing needs them any more.",
    )
    check_disk_space: bool = Field(
        True,
        description="Refuse to start a run that needs more disk space than is free; false = only "
        "warn.",
    )


class AnimationRow(StrictModel):
    """One row of the animations table."""

    subject: str
    driving: str


@dataclass(frozen=True)
class Config:
    """A valid configuration.

    Attributes:
        results: folder of everything that is made.
        quality: name of the preset.
        settings: all stage settings, presets and explicit keys merged.
        subjects, driving: rows of the tables by name, in the order of the tables.
        animations: (subject, driving) pairs to render.
        rounds: (first, last + 1) denoising step of every sampling round; empty without sampling.
        keep_intermediates, check_disk_space: see ConfigFile.
    """

    results: str
    quality: str
    settings: SubjectSettings
    subjects: dict[str, Subject]
    driving: dict[str, Driving]
    animations: tuple[tuple[str, str], ...]
    rounds: tuple[tuple[int, int], ...]
    keep_intermediates: bool = False
    check_disk_space: bool = True

    def sets_aside(self, row: Subject) -> bool:
        """Whether a part of the subject's own frames is kept back to measure the avatar on."""
        return (
            self.settings.evaluation.protocol != "ground_truth"
            and row.held_out is None
            and row.avatar is None
        )

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Subjects with images to compare with."""
        return tuple(
            name for name, row in self.subjects.items() if row.is_evaluated or self.sets_aside(row)
        )

    @property
    def reenacted(self) -> tuple[tuple[str, str], ...]:
        """(subject, driving) pairs whose subject has photos to compare with."""
        return tuple(
            (name, driving)
            for name, driving in self.animations
            if not self.subjects[name].avatar or self.subjects[name].is_evaluated
        )

    @property
    def imported(self) -> tuple[str, ...]:
        """Subjects with a ready avatar."""
        return tuple(name for name, row in self.subjects.items() if row.avatar)

    @property
    def fitted(self) -> tuple[str, ...]:
        """Subjects whose avatar is fitted."""
        return tuple(name for name, row in self.subjects.items() if not row.avatar)

    @property
    def tracked(self) -> tuple[str, ...]:
        """Subjects with a head-model fit: of an imported avatar only to compare it with photos."""
        return tuple(
            name for name, row in self.subjects.items() if not row.avatar or row.is_evaluated
        )

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards of a round: `1-of-8` to `8-of-8`."""
        count = self.settings.sampling.num_shards
        return tuple(f"{i}-of-{count}" for i in range(1, count + 1))

    @property
    def uses_demo_head(self) -> bool:
        """Whether the procedural head model is used."""
        return self.settings.head_model.path == "demo"


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Reads a YAML configuration file.

    Raises:
        ConfigError: missing, not YAML (with the line), or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file"]) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), [f"not readable as YAML: {error}"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            str(path), [f"must hold key: value lines, not a {type(content).__name__}"]
        )
    return content


def load_config(raw: Mapping[str, Any], config_file: str | Path = "config.yaml") -> Config:
    """Checks a configuration and reads its tables.

    Args:
        raw: content of the configuration file, command line values merged in.
        config_file: where it came from; relative paths in it are taken from its folder.

    Raises:
        ConfigError: lists every problem, each with its key or with file and line.
    """
    base = Path(os.path.relpath(Path(config_file).parent))
    merged = with_preset(_without_null_text(raw))
    try:
        file = _validate(merged)
        problems: list[str] = []
    except ValidationError as error:
        problems = [
            describe_error(detail, ConfigFile) for detail in error.errors(include_url=False)
        ]
        # What is wrong is set aside, to find the problems of everything else as well.
        file = _valid_part(merged, error)

    settings, path_problems = _resolve_settings(file, base)
    problems += path_problems
    subjects, subject_problems = _load_subjects(file, base)
    driving, driving_problems = _load_driving(file, base)
    problems += subject_problems + driving_problems
    settings = _choose_assets(settings, subjects, base)
    # Imported avatars need no views.
    samples = settings.sampling.num_views > 0 and not (
        subjects and all(row.avatar is not None for row in subjects.values())
    )
    problems += _settings_problems(settings, samples)
    animations, animation_problems = _pairs(file, base, subjects, driving)
    if not (subject_problems or driving_problems):  # else only consequences of these
        problems += _demo_problems(settings, subjects, driving)
        problems += _tracking_problems(settings, subjects, driving)
        problems += animation_problems
    rounds: tuple[tuple[int, int], ...] = ()
    if samples:
        try:
            rounds = sampling_rounds(settings)
        except UserError as error:
            problems.append(str(error))
    try:
        results = resolve_path(file.results, Path("."))
    except KeyError as error:
        problems.append(f"results: environment variable {error.args[0]} is not set")
    if problems:
        raise ConfigError(str(config_file), list(dict.fromkeys(problems))) from None
    return Config(
        results,
        file.quality,
        settings,
        subjects,
        driving,
        animations,
        rounds,
        file.keep_intermediates,
        file.check_disk_space,
    )


def with_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the values of its quality preset filled in where it says nothing."""
    # An empty section ("sampling:" with every key commented out) is null in YAML.
    merged = {
        key: {} if value is None and key in _SECTIONS else value for key, value in raw.items()
    }
    preset = PRESETS.get(str(merged.get("quality", "default")), {})
    for section, values in preset.items():
        own = merged.get(section, {})
        if isinstance(own, Mapping):
            merged[section] = {**values, **own}
    return merged


_SECTIONS = frozenset(SubjectSettings.model_fields)


def sampling_rounds(settings: SubjectSettings) -> tuple[tuple[int, int], ...]:
    """Step range of every sampling round.

    Raises:
        UserError: the number of steps or a sync step lies outside the schedule.
    """
    sampling = settings.sampling
    steps = ddim_step_count(sampling.num_inference_steps)
    return tuple(round_steps(sampling.sync_steps, steps, sampling.num_shards))


def _validate(content: Mapping[str, Any]) -> ConfigFile:
    """Validates strictly, but takes text that spells a value for that value where one is wanted.

    Snakemake hands over nested command line values (`sampling={num_views: 4}`) as text, and YAML
    reads 1e-3 as text (it wants 1.0e-3).
    """
    # Through JSON: strict types (no "yes" for 1), yet lists may become tuples.
    text = json.dumps(content, default=str)
    try:
        return ConfigFile.model_validate_json(text, strict=True)
    except ValidationError as error:
        spelled: dict[str, Any] = json.loads(text)
        for detail in error.errors():
            value = detail["input"]
            if detail["type"] in _SPELLABLE and isinstance(value, str):
                _replace(spelled, detail["loc"], _spelled_value(value))
            elif detail["type"] == "string_type" and type(value) is int:
                _replace(spelled, detail["loc"], str(value))  # a folder named 2024
        return ConfigFile.model_validate_json(json.dumps(spelled), strict=True)


_SPELLABLE = frozenset({"int_type", "float_type", "bool_type"})


def _spelled_value(text: str) -> Any:
    if _NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _replace(content: Any, location: tuple[int | str, ...], value: Any) -> None:
    for part in location[:-1]:
        content = content[part]
    content[location[-1]] = value


def _without_null_text(value: Any) -> Any:
    """Text `null` of the command line becomes nothing; keys become text."""
    if isinstance(value, Mapping):
        return {str(key): _without_null_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_null_text(item) for item in value]
    return None if value == "null" else value


def _valid_part(merged: dict[str, Any], error: ValidationError) -> ConfigFile:
    """The configuration without the keys that are wrong, their defaults instead."""
    cleaned: dict[str, Any] = json.loads(json.dumps(merged, default=str))
    for detail in error.errors():
        holder: Any = cleaned
        path = [part for part in detail["loc"] if not str(part).startswith(("list[", "str"))]
        # The key to drop is the innermost one that is a key of a section.
        for depth, part in enumerate(path):
            last = depth == min(len(path), 2) - 1
            if not isinstance(holder, dict) or part not in holder:
                break
            if last:
                del holder[part]
                break
            holder = holder[part]
    try:
        return _validate(cleaned)
    except ValidationError:
        return ConfigFile()


def _resolve_settings(file: ConfigFile, base: Path) -> tuple[SubjectSettings, list[str]]:
    values = file.model_dump(include=set(SubjectSettings.model_fields))
    problems = []
    for section, key in PATH_SETTINGS:
        text = values[section][key]
        if text is None or text in PATH_WORDS:
            continue
        if (section, key) in DOWNLOADED_PATHS and text == DOWNLOAD:
            continue
        try:
            values[section][key] = resolve_path(text, base)
        except KeyError as error:
            problems.append(f"{section}.{key}: environment variable {error.args[0]} is not set")
    problems += _resolve_training(values["training"], base)
    return SubjectSettings.model_validate(values), problems


def _resolve_training(values: dict[str, Any], base: Path) -> list[str]:
    """Makes the paths of the section `training` complete, in place; the problems."""
    problems = []
    places: list[tuple[str, Any, Any]] = [
        (key, values, key) for key in ("start", "autoencoder_start") if values[key] is not None
    ]
    for key in ("folders", "validation_folders"):
        found = (values["data"] or {}).get(key, [])
        places += [(f"data.{key}.{i}", found, i) for i in range(len(found))]
    for name, holder, key in places:
        try:
            holder[key] = resolve_path(holder[key], base)
        except KeyError as error:
            problems.append(f"training.{name}: environment variable {error.args[0]} is not set")
    return problems


def _load_subjects(file: ConfigFile, base: Path) -> tuple[dict[str, Subject], list[str]]:
    if file.subject is not None:
        return _one_subject(file.subject)
    if file.subjects is None and file.training.data is not None:
        return {}, []  # a model is trained, nothing else
    if file.subjects is None:
        return {}, ["subjects: name a table of subjects, or give one with --config subject=FOLDER"]
    try:
        path = Path(resolve_path(file.subjects, base))
    except KeyError as error:
        return {}, [f"subjects: environment variable {error.args[0]} is not set"]
    return read_table(path, Subject, SUBJECT_PATHS)


def _one_subject(text: str) -> tuple[dict[str, Subject], list[str]]:
    if text.startswith(DEMO_PREFIX):
        row = {"subject": f"demo_{text.removeprefix(DEMO_PREFIX)}", "reference": text}
    else:
        try:
            path = resolve_path(text, Path("."))
        except KeyError as error:
            return {}, [f"subject: environment variable {error.args[0]} is not set"]
        # The one place that looks at the disk: a folder with fit.npz is a ready fit.
        if (Path(path) / "fit.npz").is_file():
            column = "tracking"
        elif (Path(path) / "avatar.json").is_file() or any(Path(path).glob("chkpnt*.pth")):
            column = "avatar"
        else:
            column = "reference"
        row = {"subject": name_from_path(path), column: path}
    subject, problems = parse_row(row, Subject, "subject")
    if subject is None:
        return {}, problems
    return {subject.subject: subject}, [f"subject: {text}" for text in row_problems(subject)]


def _load_driving(file: ConfigFile, base: Path) -> tuple[dict[str, Driving], list[str]]:
    if file.driving is None:
        return {}, []  # avatars are fitted, none is animated
    if file.driving == "demo":
        return {"demo": Driving(driving="demo", fit="demo")}, []
    is_table = file.driving.lower().endswith((".tsv", ".csv", ".txt"))
    try:
        path = Path(resolve_path(file.driving, base if is_table else Path(".")))
    except KeyError as error:
        return {}, [f"driving: environment variable {error.args[0]} is not set"]
    if is_table:
        return read_table(path, Driving, DRIVING_PATHS)
    return _one_driving(path)


def _one_driving(path: Path) -> tuple[dict[str, Driving], list[str]]:
    row: dict[str, Any] = {"driving": name_from_path(str(path))}
    if path.suffix.lower() in VIDEO_SUFFIXES:
        row["video"] = str(path)
    elif path.suffix == ".npz":
        row["fit"] = str(path)
    else:
        row["fit"] = str(path / "fit.npz")
        paths = [path / name for name in ("cam_orbit.npz", "orbit.npz", "cam_static.npz")]
        row["trajectory"] = next((str(p) for p in paths if p.is_file()), None)
    driving, problems = parse_row(row, Driving, "driving")
    if driving is None:
        return {}, problems
    return {driving.driving: driving}, [f"driving: {text}" for text in row_problems(driving)]


def name_from_path(path: str) -> str:
    """A valid name made from a file or folder name: `My Photos/` becomes `my_photos`."""
    resolved = Path(path).resolve()
    stem = resolved.parent.name if resolved.name == "fit.npz" else resolved.stem
    name = re.sub(r"[^a-z0-9_-]+", "_", stem.lower()).strip("_-")
    return name[:64] or "subject"


def _choose_assets(
    settings: SubjectSettings, subjects: Mapping[str, Subject], base: Path
) -> SubjectSettings:
    """Replaces `auto` by demo assets when all subjects are demo subjects, else by the user's."""
    is_demo = bool(subjects) and all(row.demo_seed is not None for row in subjects.values())
    data = settings.training.data
    if not subjects and data is not None:
        is_demo = not data.folders and not data.validation_folders
    head_model, weights = settings.head_model.path, settings.mmdm.path
    if head_model == "auto":
        head_model = "demo" if is_demo else os.path.normpath(base / DEFAULT_HEAD_MODEL)
    companions = settings.head_model.companions
    if head_model == DOWNLOAD and companions is None:
        companions = DOWNLOAD  # nothing lies beside a downloaded model
    if weights == "auto" and settings.mmdm.url is not None:
        weights = None
    elif weights == "auto":
        weights = "demo" if is_demo else os.path.normpath(base / DEFAULT_WEIGHTS)
    if weights == "demo":
        weights = str(DEMO_WEIGHTS)
    return settings.model_copy(
        update={
            "head_model": settings.head_model.model_copy(
                update={"path": head_model, "companions": companions}
            ),
            "mmdm": settings.mmdm.model_copy(update={"path": weights}),
        }
    )


def _settings_problems(settings: SubjectSettings, samples: bool) -> list[str]:
    """Settings that are valid one by one but can never work together.

    Args:
        settings: of all stages.
        samples: whether views are generated of any subject.
    """
    sampling, fitting = settings.sampling, settings.fitting
    problems = []
    if sampling.max_references >= sampling.views_per_call:
        problems.append(
            f"sampling.max_references: must be less than sampling.views_per_call "
            f"({sampling.views_per_call}), which counts references and generated views together "
            f"(value {sampling.max_references})"
        )
    mmdm = settings.mmdm
    if samples and mmdm.path is None and mmdm.url is None:
        problems.append(
            "mmdm.path: must name the weights when views are sampled (sampling.num_views is "
            f"{sampling.num_views}), or mmdm.url where to download them; set sampling.num_views to "
            "0 to fit on the references alone"
        )
    if mmdm.path is not None and mmdm.url is not None:
        problems.append(
            "mmdm.url: give either an address or mmdm.path, not both; leave mmdm.path at 'auto' "
            f"(value {mmdm.path!r})"
        )
    if mmdm.config_url is not None and mmdm.url is None:
        problems.append("mmdm.config_url: belongs to mmdm.url, which is not set")
    hashes: dict[str, str | None] = {"mmdm.sha256": mmdm.sha256}
    hashes |= {"head_model.sha256": settings.head_model.sha256}
    tracking = settings.tracking
    hashes |= {"tracking.networks_sha256": tracking.networks_sha256}
    if tracking.networks == DOWNLOAD and None in (tracking.networks_url, tracking.networks_sha256):
        problems.append(
            "tracking.networks: 'download' needs tracking.networks_url and tracking.networks_sha256"
        )
    for name, digest in (settings.head_model.companions_sha256 or {}).items():
        hashes[f"head_model.companions_sha256.{name}"] = digest
    for key, value in hashes.items():
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value.strip()):
            problems.append(f"{key}: must have 64 hexadecimal digits (value {value!r})")
    for section, key in URL_SETTINGS:
        url = getattr(getattr(settings, section), key)
        if url is not None and not _DOWNLOADABLE.fullmatch(url):
            problems.append(
                f"{section}.{key}: must be an https:// address of a file (value {url!r})"
            )
    smallest = max(8, 2**fitting.deform_net_layers)
    if fitting.uv_resolution < smallest or fitting.uv_resolution.bit_count() != 1:
        problems.append(
            f"fitting.uv_resolution: must be a power of two, at least {smallest} with "
            f"fitting.deform_net_layers {fitting.deform_net_layers} (value {fitting.uv_resolution})"
        )
    for start, end in (("densify_from", "densify_until"), ("lpips_start", "lpips_end")):
        first, last = getattr(fitting, start), getattr(fitting, end)
        if first > last:
            problems.append(
                f"fitting.{start}: must be at most fitting.{end} ({last}) (value {first})"
            )
    if fitting.require_lpips and fitting.lpips_weights is None:
        problems.append("fitting.lpips_weights: must name the weights file, require_lpips is true")
    try:
        ddim_step_count(settings.training.denoiser.sample_steps)
    except UserError as error:
        problems.append(f"training.denoiser.sample_steps: {error}")
    weight = settings.training.autoencoder.perceptual_weight
    if settings.training.train_autoencoder and weight > 0 and fitting.lpips_weights is None:
        problems.append(
            f"training.autoencoder.perceptual_weight: needs fitting.lpips_weights (value {weight})"
        )
    if any(not 0 <= value <= 1 for value in settings.animation.background):
        problems.append(
            "animation.background: must be three numbers from 0 to 1 "
            f"(value {list(settings.animation.background)})"
        )
    return problems


def _demo_problems(
    settings: SubjectSettings, subjects: Mapping[str, Subject], driving: Mapping[str, Driving]
) -> list[str]:
    """Demo rows only make sense on the demo head model."""
    demo = [f"subject {name}" for name, row in subjects.items() if row.demo_seed is not None]
    demo += [f"driving sequence {name}" for name, row in driving.items() if row.is_demo]
    if settings.head_model.path == "demo" or not demo:
        return []
    return [
        f"head_model.path: demo rows ({', '.join(demo)}) need the demo head model, 'demo' "
        f"(value {settings.head_model.path!r}); do not mix them with real subjects"
    ]


def _tracking_problems(
    settings: SubjectSettings, subjects: Mapping[str, Subject], driving: Mapping[str, Driving]
) -> list[str]:
    """Rows that need a tracker when none is chosen."""
    if settings.tracking.backend != "precomputed":
        return []
    untracked = [
        f"subject {name}"
        for name, subject in subjects.items()
        if subject.tracking is None
        and subject.demo_seed is None
        and (subject.avatar is None or subject.is_evaluated)
    ]
    untracked += [f"driving sequence {name}" for name, row in driving.items() if row.fit is None]
    if not untracked:
        return []
    return [
        f"tracking.backend: 'precomputed' tracks nothing, but {', '.join(untracked)} have no ready "
        "fit; choose a tracker, or name the fits in the tables"
    ]


def _pairs(
    file: ConfigFile, base: Path, subjects: Mapping[str, Subject], driving: Mapping[str, Driving]
) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """(subject, driving) pairs in the order of the tables, and the problems."""
    everything = [(s, d) for s in subjects for d in driving]
    single_run = file.subject is not None
    if file.animations == "all" or single_run:
        return tuple(everything), []
    patterns: list[tuple[str, str, str]] = []  # (where, subject, driving)
    problems: list[str] = []
    if isinstance(file.animations, str):
        if not file.animations.endswith(".tsv"):
            return (), [
                "animations: must be 'all', a list of 'subject:driving' patterns or a .tsv table "
                f"(value {file.animations!r})"
            ]
        table = Path(os.path.normpath(base / file.animations))
        rows, problems = read_rows(table, tuple(AnimationRow.model_fields))
        for line, cells in rows:
            if len(cells) < 2:
                problems.append(f"{table}:{line}: needs a subject and a driving sequence")
            else:
                patterns.append((f"{table}:{line}", cells["subject"], cells["driving"]))
    else:
        for number, text in enumerate(file.animations):
            subject, colon, sequence = text.partition(":")
            if colon:
                patterns.append((f"animations.{number}", subject, sequence))
            else:
                problems.append(
                    f"animations.{number}: must be 'subject:driving', * and ? allowed "
                    f"(value {text!r})"
                )
    wanted = set()
    for where, subject, sequence in patterns:
        found = {
            (s, d)
            for s, d in everything
            if fnmatch.fnmatchcase(s, subject) and fnmatch.fnmatchcase(d, sequence)
        }
        if not found:
            problems.append(f"{where}: '{subject}:{sequence}' fits no subject and driving sequence")
        wanted |= found
    return tuple(pair for pair in everything if pair in wanted), problems
