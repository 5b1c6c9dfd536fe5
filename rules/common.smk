"""Configuration, wildcard constraints and all input functions; the other rule files hold rules."""

import sys
from functools import cache
from pathlib import Path

# An installed copy must not win over this checkout.
sys.path.insert(0, str(Path(workflow.basedir)))

from cap4d_core.batch.hooks import after_failure, after_success, before_run
from cap4d_core.batch.planning import (
    NAME,
    folder_state,
    pattern_of,
    pattern_without,
    speed_up_planning,
    subject_pattern,
)
from cap4d_core.batch.resources import read_learned
from cap4d_core.config import DOWNLOAD, LPIPS_DOWNLOAD, load_config
from cap4d_core.errors import UserError
from cap4d_core.run_guard import claim_results
from cap4d_core.training_settings import expand_folders
from cap4d_core.versions import STAGE_VERSIONS

speed_up_planning()

CONFIG_FILE = (workflow.overwrite_configfiles or ["config.yaml"])[-1]
CONFIG = load_config(config, CONFIG_FILE)
SAMPLES_VIEWS = bool(CONFIG.rounds)
RESULTS = CONFIG.results
LEARNED = read_learned(RESULTS)


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


wildcard_constraints:
    subject=subject_pattern(),
    driving=NAME,
    round=r"[1-9]\d*",
    scatteritem=r"\d+-of-\d+",


def intermediate(path):
    """A file that is deleted when all jobs that need it are done, unless it is to be kept."""
    return path if CONFIG.keep_intermediates else temp(path)


def settings(section):
    """A section of the configuration as plain JSON types: what a rule's results depend on."""
    return getattr(CONFIG.settings, section).model_dump(mode="json")


def memory(rule, megabytes):
    """What a job may need, learned from earlier ones where there are any; more in later attempts."""
    return per_attempt(LEARNED.memory_mb(rule, CONFIG.settings, megabytes))


def minutes(rule, default):
    return per_attempt(LEARNED.runtime_min(rule, CONFIG.settings, default))


def per_attempt(amount):
    return lambda wildcards, attempt: amount * attempt


# What is made, per stage -------------------------------------------------------------------------


def tracked_files():
    return [
        *collect(rules.track_subject.output, subject=CONFIG.tracked),
        *collect(rules.track_driving.output, driving=CONFIG.driving),
    ]


def sampled_files():
    if not SAMPLES_VIEWS:
        return collect(rules.crop_references.output, subject=CONFIG.tracked)
    compared = [name for name in CONFIG.tracked if name in CONFIG.imported]
    return [
        *collect(rules.crop_references.output, subject=compared),
        *collect(rules.plan_views.output, subject=CONFIG.fitted),
        *collect(rules.encode_references.output, subject=CONFIG.fitted),
        *round_files(),
        *collect(
            rules.decode_views.output,
            subject=CONFIG.fitted,
            scatteritem=CONFIG.shards,
        ),
    ]


def round_files():
    """Latents of all rounds; none where they are deleted, else they would be made again."""
    if not CONFIG.keep_intermediates:
        return []
    numbers = range(1, len(CONFIG.rounds) + 1)
    return [
        path
        for subject in CONFIG.fitted
        for number in numbers
        for path in round_shards(subject, number)
    ]


def avatar_files():
    return [
        *collect(rules.fit_avatar.output, subject=CONFIG.fitted),
        *collect(rules.import_avatar.output, subject=CONFIG.imported),
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
    return collect(rules.evaluate_avatar.output, subject=CONFIG.evaluated)


def reenactment_files():
    return [
        path
        for subject, driving in CONFIG.reenacted
        for path in collect(
            rules.evaluate_reenactment.output.metrics,
            subject=subject,
            driving=driving,
        )
    ]


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


def subject_row(wildcards):
    return table_row(CONFIG.subjects, wildcards.subject, "subject")


def driving_row(wildcards):
    return table_row(CONFIG.driving, wildcards.driving, "driving sequence")


def table_row(table, name, kind):
    if name not in table:
        raise WorkflowError(f"'{name}' is no {kind} of {CONFIG_FILE}")
    return table[name]


def subject_fit_folder(wildcards):
    """Folder of the ready fit, None for subjects to be tracked."""
    row = subject_row(wildcards)
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
    return [] if subject_fit_folder(wildcards) else subject_row(wildcards).reference


def subject_files(wildcards):
    """State of the user's folder of photos or of the ready fit."""
    row = subject_row(wildcards)
    return folder_state(
        None if row.demo_seed is not None else row.tracking or row.reference
    )


def avatar_state(wildcards):
    return folder_state(subject_row(wildcards).avatar)


def held_out_state(wildcards):
    return folder_state(subject_row(wildcards).held_out)


def face_networks(wildcards):
    """Their folder, or the record of their download, which lies in it; nothing for shipped ones."""
    if CONFIG.settings.tracking.networks == DOWNLOAD:
        return rules.download_networks.output.record
    return CONFIG.settings.tracking.networks or []


def subject_landmarks(wildcards):
    """Landmarks on the head model, which only tracking needs."""
    landmarks = rules.place_landmarks.output.landmarks
    return landmarks if subject_recording(wildcards) else []


def driving_fit(wildcards):
    row = driving_row(wildcards)
    return (
        f"{RESULTS}/demo/driving/{row.driving}/fit.npz"
        if row.is_demo
        else row.fit or []
    )


def driving_recording(wildcards):
    row = driving_row(wildcards)
    return [] if row.fit else row.video


def driving_landmarks(wildcards):
    landmarks = rules.place_landmarks.output.landmarks
    return landmarks if driving_recording(wildcards) else []


def driving_video(wildcards):
    """Where the sound of an animation comes from."""
    is_wanted = CONFIG.settings.animation.sound
    return (driving_row(wildcards).video or []) if is_wanted else []


def driving_trajectory(wildcards):
    row = driving_row(wildcards)
    if row.is_demo:
        return f"{RESULTS}/demo/driving/{row.driving}/orbit.npz"
    return row.trajectory or []


def kept_fit(wildcards):
    """The tracking, without the frames that are set aside to measure the avatar on."""
    if CONFIG.sets_aside(subject_row(wildcards)):
        return collect(rules.hold_out.output.fit, subject=wildcards.subject)
    return collect(rules.track_subject.output.fit, subject=wildcards.subject)


def kept_references(wildcards):
    if CONFIG.sets_aside(subject_row(wildcards)):
        return collect(rules.hold_out.output.references, subject=wildcards.subject)
    return collect(rules.track_subject.output.references, subject=wildcards.subject)


def held_out_images(wildcards):
    row = subject_row(wildcards)
    if CONFIG.sets_aside(row):
        return collect(rules.hold_out.output.held_out, subject=wildcards.subject)
    return row.held_out or f"{RESULTS}/demo/held_out/{row.subject}"


def held_out_split(wildcards):
    """How they were chosen; nothing where they were given."""
    if CONFIG.sets_aside(subject_row(wildcards)):
        return collect(rules.hold_out.output.split, subject=wildcards.subject)
    return []


def true_performance(wildcards):
    """True pictures of a performance: of demo people only."""
    if demo_seed(wildcards) is None or not CONFIG.uses_demo_head:
        return []
    return collect(
        rules.make_demo_performance.output.folder,
        subject=wildcards.subject,
        driving=wildcards.driving,
    )


def identity_model(wildcards):
    return CONFIG.settings.evaluation.identity_model or []


def demo_seed(wildcards):
    return subject_row(wildcards).demo_seed


@cache
def round_shards(subject, number):
    """All shards of one round. One list for all that ask: a large plan asks very often."""
    folder = f"{RESULTS}/{subject}/views/rounds/{number}"
    return [f"{folder}/{shard}.safetensors" for shard in CONFIG.shards]


def previous_round(wildcards):
    """Shards of the round before: views are dealt anew, so each shard needs all of them."""
    if wildcards.round == "1":
        return []
    return round_shards(wildcards.subject, int(wildcards.round) - 1)


def last_round_shard(wildcards):
    folder = f"{RESULTS}/{wildcards.subject}/views/rounds/{len(CONFIG.rounds)}"
    return f"{folder}/{wildcards.scatteritem}.safetensors"


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
    return subject_row(wildcards).avatar


def reference_images(wildcards):
    if SAMPLES_VIEWS and not subject_row(wildcards).avatar:
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


# Training ----------------------------------------------------------------------------------------


def training_folder():
    """Of the run; where there is nothing to train on one that no other rule can ask for."""
    training = CONFIG.settings.training
    return f"{RESULTS}/training/{training.name if training.data else '.unset'}"


def training_fits(wildcards):
    """Of all people; their pictures are looked at by the job itself."""
    data = CONFIG.settings.training.data
    if data is None:
        raise WorkflowError(
            f"{CONFIG_FILE}: training.data: say what to train on: folders of tracked people, or "
            "demo_subjects (docs/training.md)"
        )
    try:
        folders = expand_folders(data.folders)
        folders += expand_folders(
            data.validation_folders, "training.data.validation_folders"
        )
    except UserError as error:
        raise WorkflowError(str(error))
    return [f"{folder}/fit.npz" for folder in folders]


def training_start(wildcards):
    training = CONFIG.settings.training
    places = [training.start, training.autoencoder_start]
    return [path for path in places if path is not None]


def training_lpips(wildcards):
    training = CONFIG.settings.training
    is_used = training.train_autoencoder and training.autoencoder.perceptual_weight > 0
    return lpips_weights(wildcards) if is_used else []
