"""Which jobs are planned: per profile, per mode, at scale; and what a bad configuration says."""

from __future__ import annotations

import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from tests.workflow.snakemake_runs import ROOT, dry_run, run_snakemake

pytestmark = pytest.mark.workflow


def write_project(
    folder: Path, num_subjects: int = 2, num_driving: int = 1, **config: object
) -> Path:
    """A configuration with real-looking subjects whose files exist but are empty."""
    (folder / "data").mkdir(parents=True)
    names = [f"s{i:03d}" for i in range(num_subjects)]
    for name in names:
        (folder / "data" / name).mkdir()
        for file in ("fit.npz", "reference_images.json"):
            (folder / "data" / name / file).touch()
    motions = [f"d{i}" for i in range(num_driving)]
    for name in motions:
        (folder / "data" / f"{name}.npz").touch()
    (folder / "flame").mkdir()
    (folder / "mmdm.ckpt").touch()
    rows = [f"{name}\tdata/{name}" for name in names]
    (folder / "subjects.tsv").write_text("\n".join(["subject\ttracking", *rows]) + "\n")
    rows = [f"{name}\tdata/{name}.npz" for name in motions]
    (folder / "driving.tsv").write_text("\n".join(["driving\tfit", *rows]) + "\n")
    content = {
        "subjects": "subjects.tsv",
        "driving": "driving.tsv",
        "head_model": {"path": "flame"},
        "mmdm": {"path": "mmdm.ckpt"},
        **config,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


PER_SUBJECT = ("track_subject", "plan_views", "encode_references", "fit_avatar")


@pytest.mark.parametrize("profile", ["default", "workstation", "slurm"])
def test_jobs_of_every_profile(tmp_path: Path, profile: str) -> None:
    config = write_project(tmp_path, 2, 3, sampling={"num_shards": 4, "sync_steps": [0.1, 0.5]})
    counts = dry_run(tmp_path, config, profile=profile)
    assert counts.pop("sample_views") == 2 * 3 * 4  # subjects x rounds x shards
    assert counts.pop("decode_views") == 2 * 4
    assert counts.pop("animate_avatar") == 2 * 3
    assert counts.pop("track_driving") == 3
    assert {counts.pop(rule) for rule in PER_SUBJECT} == {2}
    assert counts == {"prepare_head_model": 1, "prepare_mmdm": 1, "write_report": 1, "all": 1}


def test_shipped_demo(tmp_path: Path) -> None:
    counts = dry_run(tmp_path, ROOT / "config.yaml")
    assert counts["make_demo_head"] == counts["make_demo_subject"] == 1
    assert counts["evaluate_avatar"] == counts["make_demo_held_out"] == 1


def test_fitting_without_a_diffusion_model(tmp_path: Path) -> None:
    config = write_project(tmp_path, sampling={"num_views": 0}, mmdm={"path": None})
    counts = dry_run(tmp_path, config)
    assert counts["crop_references"] == counts["fit_avatar"] == 2
    assert not {"prepare_mmdm", "plan_views", "sample_views", "decode_views"} & set(counts)


def test_downloads_only_where_they_are_asked_for(tmp_path: Path) -> None:
    url = "https://example.org/cap4d_mmdm_100k.ckpt"
    config = write_project(
        tmp_path, mmdm={"url": url, "sha256": "0" * 64}, fitting={"lpips_weights": "download"}
    )
    counts = dry_run(tmp_path, config)
    assert counts["download_mmdm"] == counts["prepare_mmdm"] == counts["download_lpips"] == 1
    config = write_project(tmp_path / "without", mmdm={"url": url}, sampling={"num_views": 0})
    assert not {"download_mmdm", "download_lpips"} & set(dry_run(tmp_path, config))


def test_ready_avatars_are_imported_and_animated(tmp_path: Path) -> None:
    config = write_project(tmp_path, sampling={"num_shards": 1})
    for name in ("x", "y", "truth"):
        (tmp_path / "data" / name).mkdir()
    (tmp_path / "subjects.tsv").write_text(
        "subject\ttracking\tavatar\theld_out\n"
        "s000\tdata/s000\n"
        "x\t\tdata/x\n"
        "y\tdata/s001\tdata/y\tdata/truth\n"
    )
    counts = dry_run(tmp_path, config)
    assert counts["import_avatar"] == 2 and counts["animate_avatar"] == 3
    assert {counts[rule] for rule in (*PER_SUBJECT[1:], "sample_views", "decode_views")} == {1}
    # The evaluated one is compared with its photos, which needs no network.
    assert counts["evaluate_avatar"] == counts["crop_references"] == 1
    assert counts["track_subject"] == 2
    (tmp_path / "subjects.tsv").write_text("subject\tavatar\nx\tdata/x\n")
    counts = dry_run(tmp_path, config)
    assert set(counts) == {
        "all", "animate_avatar", "import_avatar", "prepare_head_model", "track_driving",
        "write_report",
    }  # fmt: skip


def test_sound_comes_from_the_driving_video(tmp_path: Path) -> None:
    config = write_project(tmp_path, num_subjects=1, sampling={"num_views": 0})
    (tmp_path / "driving.tsv").write_text("driving\tfit\tvideo\nd0\tdata/d0.npz\ttalk.mp4\n")
    words = ("--cores", "2", "-n", "--configfile", str(config))
    missing = run_snakemake(tmp_path, *words)
    assert missing.returncode == 1 and "talk.mp4" in missing.stdout
    silent = run_snakemake(tmp_path, *words, "--config", "animation={sound: false}")
    assert silent.returncode == 0, silent.stdout


def test_one_shard_has_one_round_and_targets_stop_after_their_stage(tmp_path: Path) -> None:
    config = write_project(tmp_path, sampling={"num_shards": 1})
    counts = dry_run(tmp_path, config, "--until", "sample_all")
    assert counts["sample_views"] == 2 and "fit_avatar" not in counts
    counts = dry_run(tmp_path, config, "--until", "track_all")
    assert set(counts) <= {"track_all", "prepare_head_model", "track_subject", "track_driving"}


def test_single_run_needs_no_file_edited(tmp_path: Path) -> None:
    write_project(tmp_path)
    result = run_snakemake(
        tmp_path, "--cores", "2", "-n", "--quiet", "rules",
        "--config", "subject=data/s001/", "driving=data/d0.npz", "quality=medium",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "animate_avatar" in result.stdout
    assert "results/s001/animation/d0/renders.mp4" not in result.stdout  # --quiet rules


def plan_cost(folder: Path, config: Path) -> tuple[dict[str, int], float, float]:
    """Jobs, seconds of CPU time (tests may share the machine) and GB of a plan."""
    # In a process of its own: the system keeps one account of all children a process ever had.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        counts, seconds, gigabytes = pool.submit(_plan_cost, folder, config).result()
    print(f"{sum(counts.values())} jobs planned in {seconds:.1f} s of CPU time, {gigabytes:.2f} GB")
    return counts, seconds, gigabytes


def _plan_cost(folder: Path, config: Path) -> tuple[dict[str, int], float, float]:
    counts = dry_run(folder, config)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return counts, usage.ru_utime, usage.ru_maxrss * 1024 / 1e9


def test_plan_of_sixty_subjects_is_quick(tmp_path: Path) -> None:
    counts, seconds, _ = plan_cost(tmp_path, write_project(tmp_path, 60, 4))
    assert counts["sample_views"] == 60 * 5 * 8
    assert counts["animate_avatar"] == 240
    # About 9 s; the limit only catches a change of complexity.
    assert seconds < 30


@pytest.mark.slow
def test_plan_of_five_hundred_subjects(tmp_path: Path) -> None:
    """28 008 jobs."""
    counts, seconds, gigabytes = plan_cost(tmp_path, write_project(tmp_path, 500, 4))
    assert counts["sample_views"] == 500 * 5 * 8
    assert sum(counts.values()) == 28_008
    # 51 s were seen on two busy cores; the limit only catches a change of complexity.
    assert seconds < 120
    assert gigabytes < 1.5


def test_intermediates_are_deleted_unless_kept(tmp_path: Path) -> None:
    config = write_project(tmp_path, 1, sampling={"num_shards": 2, "sync_steps": [0.5]})
    words = ("--cores", "2", "-n", "--configfile", str(config))
    deleted = run_snakemake(tmp_path, *words).stdout.count("Would remove temporary output")
    assert deleted == 2 * 2  # rounds x shards
    kept = run_snakemake(tmp_path, *words, "--config", "keep_intermediates=true")
    assert kept.returncode == 0 and "temporary" not in kept.stdout


def test_names_of_other_folders_and_unknown_names_match_no_rule(tmp_path: Path) -> None:
    config = write_project(tmp_path, sampling={"num_views": 0})
    (tmp_path / "driving.tsv").write_text("driving\tfit\ntracking\tdata/d0.npz\n")
    words = ("--cores", "2", "-n", "--configfile", str(config))
    # results/driving/tracking/fit.npz is not the fit of a subject named "driving".
    assert run_snakemake(tmp_path, *words).returncode == 0
    unknown = run_snakemake(tmp_path, "results/nobody/avatar/avatar.safetensors", *words)
    assert unknown.returncode == 1
    assert "'nobody' is no subject of" in unknown.stdout


def test_bad_configuration_is_reported_at_once_and_without_traceback(tmp_path: Path) -> None:
    config = write_project(
        tmp_path, sampling={"num_view": 12, "num_shards": 0}, qualty="low", animations=["x:*"]
    )
    with open(tmp_path / "subjects.tsv", "a") as table:
        table.write("Ana B\tdata/ana\n")
    result = run_snakemake(tmp_path, "--cores", "2", "-n", "--configfile", str(config))
    assert result.returncode == 1
    for expected in (
        "config.yaml is not valid (4 problems)",
        "sampling.num_view: unknown key (value 12); did you mean 'num_views'?",
        "sampling.num_shards: must be at least 1 (value 0)",
        "qualty: unknown key (value 'low'); did you mean 'quality'?",
        "subjects.tsv:4: subject: must consist of lower-case letters",
    ):
        assert expected in result.stdout
    assert "Traceback" not in result.stdout
