"""Configuration, wildcard constraints and all input functions; the other rule files hold rules."""

import re
import sys
from pathlib import Path

# An installed copy must not win over this checkout.
sys.path.insert(0, str(Path(workflow.basedir)))

from cap4d_core.config import DOWNLOAD, LPIPS_DOWNLOAD, load_config
from cap4d_core.run_guard import claim_results
from cap4d_core.versions import STAGE_VERSIONS

CONFIG_FILE = (workflow.overwrite_configfiles or ["config.yaml"])[-1]
CONFIG = load_config(config, CONFIG_FILE)
SUBJECTS = CONFIG.subjects
DRIVING = CONFIG.driving
EVALUATED = [name for name, row in SUBJECTS.items() if row.is_evaluated]
IMPORTED = [name for name, row in SUBJECTS.items() if row.avatar]
FITTED = [name for name in SUBJECTS if name not in IMPORTED]
# An imported avatar needs its subject's photos only where it is compared with them.
TRACKED = [name for name in SUBJECTS if name in FITTED or name in EVALUATED]
SAMPLES_VIEWS = bool(CONFIG.rounds)
RESULTS = CONFIG.results


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


def one_of(names):
    """Regular expression of a wildcard: these names, or what no name can be."""
    return "|".join(map(re.escape, names)) or "NONE"


wildcard_constraints:
    subject=one_of(SUBJECTS),
    driving=one_of(DRIVING),
    round=r"[1-9]\d*",
    scatteritem=r"\d+-of-\d+",


def settings(section):
    """A section of the configuration as plain JSON types: what a rule's results depend on."""
    return getattr(CONFIG.settings, section).model_dump(mode="json")


# What is made, per stage -------------------------------------------------------------------------


def tracked_files():
    return [
        *collect(rules.track_subject.output, subject=TRACKED),
        *collect(rules.track_driving.output, driving=DRIVING),
    ]


def sampled_files():
    if not SAMPLES_VIEWS:
        return collect(rules.crop_references.output, subject=TRACKED)
    rounds = range(1, len(CONFIG.rounds) + 1)
    compared = [name for name in TRACKED if name in IMPORTED]
    return [
        *collect(rules.crop_references.output, subject=compared),
        *collect(rules.plan_views.output, subject=FITTED),
        *collect(rules.encode_references.output, subject=FITTED),
        *collect(
            rules.sample_views.output,
            subject=FITTED,
            round=rounds,
            scatteritem=CONFIG.shards,
        ),
        *collect(rules.decode_views.output, subject=FITTED, scatteritem=CONFIG.shards),
    ]


def avatar_files():
    return [
        *collect(rules.fit_avatar.output, subject=FITTED),
        *collect(rules.import_avatar.output, subject=IMPORTED),
    ]


def animation_files():
    return [
        path
        for subject, driving in CONFIG.animations
        for path in collect(
            rules.animate_avatar.output, subject=subject, driving=driving
        )
    ]


def evaluation_files():
    return collect(rules.evaluate_avatar.output, subject=EVALUATED)


def drivings_of(subject):
    return [driving for name, driving in CONFIG.animations if name == subject]


# Where inputs come from --------------------------------------------------------------------------


def head_model_source(wildcards):
    if CONFIG.uses_demo_head:
        return rules.make_demo_head.output.folder
    if CONFIG.settings.head_model.path == DOWNLOAD:
        return rules.download_flame.output.model
    return CONFIG.settings.head_model.path


def head_model_companions(wildcards):
    """Their folder, or the record of their download, which lies in it."""
    if CONFIG.settings.head_model.companions == DOWNLOAD:
        return rules.download_companions.output.record
    return CONFIG.settings.head_model.companions or []


def subject_fit_folder(wildcards):
    """Folder of the ready fit, None for subjects to be tracked."""
    row = SUBJECTS[wildcards.subject]
    return (
        f"{RESULTS}/demo/subjects/{row.subject}"
        if row.demo_seed is not None
        else row.tracking
    )


def subject_fit(wildcards):
    folder = subject_fit_folder(wildcards)
    return [] if folder is None else f"{folder}/fit.npz"


def subject_references(wildcards):
    folder = subject_fit_folder(wildcards)
    return [] if folder is None else f"{folder}/reference_images.json"


def subject_recording(wildcards):
    """Photos or video to be tracked; nothing where there is a ready fit."""
    return (
        [] if subject_fit_folder(wildcards) else SUBJECTS[wildcards.subject].reference
    )


def driving_fit(wildcards):
    row = DRIVING[wildcards.driving]
    return (
        f"{RESULTS}/demo/driving/{row.driving}/fit.npz"
        if row.is_demo
        else row.fit or []
    )


def driving_recording(wildcards):
    row = DRIVING[wildcards.driving]
    return [] if row.fit else row.video


def driving_video(wildcards):
    """Where the sound of an animation comes from."""
    is_wanted = CONFIG.settings.animation.sound
    return (DRIVING[wildcards.driving].video or []) if is_wanted else []


def driving_trajectory(wildcards):
    row = DRIVING[wildcards.driving]
    if row.is_demo:
        return f"{RESULTS}/demo/driving/{row.driving}/orbit.npz"
    return row.trajectory or []


def held_out_images(wildcards):
    row = SUBJECTS[wildcards.subject]
    return row.held_out or f"{RESULTS}/demo/held_out/{row.subject}"


def demo_seed(wildcards):
    return SUBJECTS[wildcards.subject].demo_seed


def previous_round(wildcards):
    """Shards of the round before: views are dealt anew, so each shard needs all of them."""
    if wildcards.round == "1":
        return []
    return collect(
        rules.sample_views.output.latents,
        subject=wildcards.subject,
        round=int(wildcards.round) - 1,
        scatteritem=CONFIG.shards,
    )


def last_round_shard(wildcards):
    return collect(
        rules.sample_views.output.latents,
        subject=wildcards.subject,
        round=len(CONFIG.rounds),
        scatteritem=wildcards.scatteritem,
    )


def generated_images(wildcards):
    """Index files of all shards; none without sampling."""
    if not SAMPLES_VIEWS or not CONFIG.settings.fitting.use_generated_views:
        return []
    return collect(
        rules.decode_views.output.index,
        subject=wildcards.subject,
        scatteritem=CONFIG.shards,
    )


def ready_avatar(wildcards):
    return SUBJECTS[wildcards.subject].avatar


def reference_images(wildcards):
    if SAMPLES_VIEWS and wildcards.subject in FITTED:
        return collect(rules.encode_references.output.index, subject=wildcards.subject)
    return collect(rules.crop_references.output.index, subject=wildcards.subject)


def own_plan(wildcards):
    return CONFIG.settings.sampling.plan or []


def mmdm_download(wildcards):
    return rules.download_mmdm.output.record if CONFIG.settings.mmdm.url else []


def lpips_weights(wildcards):
    if CONFIG.settings.fitting.lpips_weights == LPIPS_DOWNLOAD:
        return rules.download_lpips.output.weights
    return CONFIG.settings.fitting.lpips_weights or []
