"""config.yaml: presets, overrides, paths, and one case per kind of mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cap4d_core import config_docs
from cap4d_core.config import Config, load_config, load_config_file, name_from_path
from cap4d_core.diffusion.step_grid import is_valid_step_count
from cap4d_core.errors import ConfigError
from cap4d_core.settings import PRESETS, SubjectSettings

ROOT = Path(__file__).parents[2]
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a configuration with one real and no demo subject, changed by keywords."""
    (tmp_path / "subjects.tsv").write_text("subject\ttracking\nana\tana\nben\tben\n")
    (tmp_path / "driving.tsv").write_text("driving\tfit\nsmile\ts.npz\ntalk\tt.npz\n")

    def load_with(**changes: Any) -> Config:
        raw: dict[str, Any] = {"subjects": "subjects.tsv", "driving": "driving.tsv", **changes}
        return load_config(raw, tmp_path / "config.yaml")

    return load_with


def problems_of(load: Load, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    return caught.value.problems


def test_shipped_configuration_is_valid_and_is_the_demo() -> None:
    config = load_config(load_config_file(ROOT / "config.yaml"), ROOT / "config.yaml")
    assert config.quality == "demo" and config.uses_demo_head
    assert config.subjects and config.animations


def test_every_preset_is_valid(load: Load) -> None:
    for quality in PRESETS:
        config = load(quality=quality)
        assert is_valid_step_count(config.settings.sampling.num_inference_steps)


def test_presets_carry_the_released_values(load: Load) -> None:
    default = load(quality="default").settings
    assert default == load().settings
    assert default.sampling.num_views == 840 and default.fitting.iterations == 100_000
    medium = load(quality="medium").settings
    assert (medium.sampling.num_views, medium.sampling.num_inference_steps) == (420, 50)
    assert medium.fitting.iterations == 50_000


def test_explicit_keys_override_the_preset_and_others_stay(load: Load) -> None:
    config = load(quality="medium", sampling={"num_views": 56})
    assert config.settings.sampling.num_views == 56
    assert config.settings.sampling.num_inference_steps == 50


def test_section_with_every_key_commented_out_keeps_the_preset(load: Load) -> None:
    config = load(quality="medium", sampling=None)
    assert config.settings.sampling.num_views == 420


def test_paths_start_at_the_configuration_file(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTS", "/data/w")
    config = load(
        head_model={"path": "flame"},
        mmdm={"path": "${WEIGHTS}/mmdm.ckpt"},
        fitting={"lpips_weights": "${NOT_SET:-/x}/vgg.pth"},
    )
    assert Path(config.settings.head_model.path).resolve() == tmp_path / "flame"
    assert config.settings.mmdm.path == "/data/w/mmdm.ckpt"
    assert config.settings.fitting.lpips_weights == "/x/vgg.pth"
    assert Path(config.subjects["ana"].tracking or "").resolve() == tmp_path / "ana"


def test_exponents_without_point_are_numbers(load: Load) -> None:
    assert yaml.safe_load("1e-3") == "1e-3"  # why this needs care
    config = load(fitting={"lr_position": "1e-3"})
    assert config.settings.fitting.lr_position == 1e-3


def test_nested_values_of_the_command_line_arrive_as_text(load: Load) -> None:
    config = load(
        sampling={"num_views": "56", "guidance_scale": "1.5", "sync_steps": ["0.1", "5"]},
        fitting={"use_lower_jaw": "false"},
        mmdm={"path": "weights", "sha256": "null"},
    )
    sampling = config.settings.sampling
    assert (sampling.num_views, sampling.guidance_scale) == (56, 1.5)
    assert sampling.sync_steps == [0.1, 5]
    assert config.settings.fitting.use_lower_jaw is False
    assert config.settings.mmdm.sha256 is None
    assert list(load(subject=2024).subjects) == ["2024"]


def test_rounds_and_shards(load: Load) -> None:
    config = load(sampling={"num_shards": 4, "sync_steps": [0.5], "num_inference_steps": 10})
    assert config.rounds == ((0, 5), (5, 10))
    assert config.shards == ("1-of-4", "2-of-4", "3-of-4", "4-of-4")
    assert load(sampling={"num_shards": 1}).rounds == ((0, 100),)
    assert load(sampling={"num_views": 0}).rounds == ()


def test_animations(load: Load, tmp_path: Path) -> None:
    assert len(load().animations) == 4
    assert load(animations=["ana:*"]).animations == (("ana", "smile"), ("ana", "talk"))
    assert load(animations=["*:talk", "ben:talk"]).animations == (("ana", "talk"), ("ben", "talk"))
    (tmp_path / "pairs.tsv").write_text("subject\tdriving\nben\tsmile\n")
    assert load(animations="pairs.tsv").animations == (("ben", "smile"),)


def test_photos_and_video_are_tracked(load: Load) -> None:
    config = load(subject="photos/", driving="film.mp4")
    assert config.subjects["photos"].reference == "photos"
    assert config.driving["film"].video == "film.mp4"


def test_without_driving_nothing_is_animated(load: Load) -> None:
    assert load(driving=None).animations == ()


def test_single_run_from_the_command_line(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = tmp_path / "My Photos"
    fit.mkdir()
    (fit / "fit.npz").touch()
    (tmp_path / "seq").mkdir()
    (tmp_path / "seq" / "orbit.npz").touch()
    config = load(subject="My Photos/", driving="seq", animations=["ana:talk"])
    assert list(config.subjects) == ["my_photos"]
    assert config.subjects["my_photos"].tracking == "My Photos"
    assert config.driving["seq"].trajectory == "seq/orbit.npz"
    assert config.animations == (("my_photos", "seq"),)  # patterns are about the tables
    demo = load(subject="demo:3", driving="demo", sampling={"num_views": 0})
    assert demo.uses_demo_head and demo.subjects["demo_3"].demo_seed == 3


def test_ready_avatars_need_neither_weights_nor_tracker(load: Load, tmp_path: Path) -> None:
    (tmp_path / "only.tsv").write_text("subject\tavatar\nana\tfits/ana\n")
    changes: dict[str, Any] = {"mmdm": {"path": None}, **PRECOMPUTED}
    config = load(subjects="only.tsv", **changes)
    assert config.rounds == () and config.settings.head_model.path.endswith("assets/flame")
    (tmp_path / "only.tsv").write_text("subject\tavatar\treference\nana\ta\nben\t\tphotos\n")
    problems = problems_of(load, subjects="only.tsv", **changes)
    assert len(problems) == 2 and "mmdm.path: must name the weights" in problems[0]
    assert "subject ben have no ready fit" in problems[1]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "chkpnt30000.pth").touch()
    single = load(subject=str(tmp_path / "old"))
    assert single.subjects["old"].avatar == str(tmp_path / "old")


def test_downloads_are_asked_for_by_address_and_word(load: Load) -> None:
    url = "https://example.org/model.ckpt"
    settings = load(mmdm={"url": url}, fitting={"lpips_weights": "download"}).settings
    assert settings.mmdm.path is None and settings.mmdm.url == url
    assert settings.fitting.lpips_weights == "download"  # no path of the config file's folder
    load(mmdm={"url": "http://127.0.0.1:8000/model.ckpt"})  # this machine itself


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("My Photos/", "my_photos"),
        ("a/b.mp4", "b"),
        ("x/seq_00/fit.npz", "seq_00"),
        ("Ä!", "subject"),
    ],
)
def test_names_from_paths(path: str, name: str) -> None:
    assert name_from_path(path) == name


PRECOMPUTED: dict[str, Any] = {"tracking": {"backend": "precomputed"}}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"qualty": "low"}, "qualty: unknown key (value 'low'); did you mean 'quality'?"),
    ({"quality": "meduim"}, "quality: must be one of"),
    ({"sampling": {"num_view": 3}}, "unknown key (value 3); did you mean 'num_views'?"),
    ({"sampling": {"num_shards": 0}}, "sampling.num_shards: must be at least 1 (value 0)"),
    ({"mmdm": {"url": "http://example.org/m.ckpt"}}, "mmdm.url: must be an https:// address"),
    ({"mmdm": {"url": "https://x.org/m", "path": "w"}}, "mmdm.url: give either an address or"),
    ({"mmdm": {"config_url": "https://x.org/c"}}, "mmdm.config_url: belongs to mmdm.url"),
    ({"mmdm": {"sha256": "abc"}}, "mmdm.sha256: must have 64 hexadecimal digits (value 'abc')"),
    ({"fitting": {"lpips_url": "vgg.pth"}}, "fitting.lpips_url: must be an https:// address"),
    ({"sampling": {"num_views": "many"}}, "num_views: must be a whole number (value 'many')"),
    ({"sampling": {"num_views": True}}, "sampling.num_views: must be a whole number (value True)"),
    ({"sampling": {"num_views": 1.5}}, "sampling.num_views: must be a whole number (value 1.5)"),
    ({"sampling": 5}, "sampling: must be a section of key: value lines (value 5)"),
    ({"sampling": {"max_references": 8}}, "sampling.max_references: must be less than"),
    ({"sampling": {"num_inference_steps": 999}}, "999 denoising steps are not possible"),
    ({"sampling": {"num_inference_steps": 5000}}, "the schedule has 1000 timesteps"),
    ({"sampling": {"sync_steps": [200]}}, "sampling.sync_steps holds step 200, but only 100 steps"),
    ({"sampling": {"sync_steps": [1.5]}}, "sampling.sync_steps holds 1.5"),
    ({"sampling": {"sync_steps": "often"}}, "sampling.sync_steps: must be a list (value 'often')"),
    ({"mmdm": {"path": None}}, "mmdm.path: must name the weights"),
    ({"fitting": {"uv_resolution": 100}}, "fitting.uv_resolution: must be a power of two"),
    ({"fitting": {"uv_resolution": 32}}, "at least 64 with fitting.deform_net_layers 6"),
    ({"fitting": {"densify_from": 90_000}}, "fitting.densify_from: must be at most"),
    ({"fitting": {"require_lpips": True}}, "fitting.lpips_weights: must name"),
    ({"fitting": {"renderer": "gsplatt"}}, "did you mean 'gsplat'?"),
    ({"fitting": {"use_lower_jaw": "yes"}}, "fitting.use_lower_jaw: must be true or false"),
    ({"animation": {"background": [255, 0, 0]}}, "animation.background: must be three numbers"),
    ({"tracking": {"backend": "flowface"}}, "tracking.backend: must be one of"),
    ({"head_model": {"path": "${SURELY_UNSET}"}}, "environment variable SURELY_UNSET"),
    ({"subjects": None}, "subjects: name a table of subjects"),
    ({"subjects": "none.tsv"}, "none.tsv: no such file"),
    ({"driving": "none.tsv"}, "none.tsv: no such file"),
    (PRECOMPUTED | {"driving": "film.mp4"}, "tracks nothing, but driving sequence film have no"),
    (PRECOMPUTED | {"subject": "photos"}, "tracks nothing, but subject photos have no ready fit"),
    ({"animations": ["ana:sleep"]}, "'ana:sleep' fits no subject"),
    ({"animations": ["ana"]}, "animations.0: must be 'subject:driving'"),
    ({"animations": "some"}, "animations: must be 'all', a list"),
    ({"driving": "demo"}, "head_model.path: demo rows (driving sequence demo) need the demo head"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(load: Load, changes: dict[str, Any], expected: str) -> None:
    problems = problems_of(load, **changes)
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_all_problems_at_once(load: Load) -> None:
    problems = problems_of(
        load,
        foo=1,
        sampling={"num_view": 3, "num_shards": 0, "max_references": 9},
        fitting={"iterations": -1},
        animations=["nobody:*"],
    )
    found = {problem.split(":")[0] for problem in problems}
    assert found == {
        "foo", "sampling.num_view", "sampling.num_shards", "sampling.max_references",
        "fitting.iterations", "animations.0",
    }  # fmt: skip


def test_broken_yaml_says_the_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sampling:\n  num_views: [1\nfoo: 2\n")
    with pytest.raises(ConfigError, match="line 3"):
        load_config_file(path)
    path.write_text("- a list\n")
    with pytest.raises(ConfigError, match="key: value lines"):
        load_config_file(path)


@pytest.mark.parametrize(
    ("path", "text"),
    [("config.schema.json", config_docs.schema), ("docs/configuration.md", config_docs.reference)],
)
def test_generated_files_are_in_sync(
    path: str, text: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    file = ROOT / path
    if request.config.getoption("--fix"):
        file.write_text(text(), "utf-8")
    assert file.read_text("utf-8") == text(), f"{path} is out of date: run pytest --fix"


def test_schema_covers_every_key() -> None:
    schema = json.loads(config_docs.schema())
    assert set(SubjectSettings.model_fields) < set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_configuration_is_light() -> None:
    """Every cluster job parses the Snakefile; a GPU is chosen before torch is imported."""
    modules = "cap4d_core.config, cap4d_core.job, cap4d_core.gpu, cap4d_core.slurm"
    code = (
        f"import sys, {modules}; "
        "print([m for m in ('torch', 'numpy', 'pandas', 'diffusers', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
