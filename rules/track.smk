"""Tracking: head-model fits of the subjects and of the driving sequences."""


rule track_subject:
    input:
        # Either a ready fit or what is to be tracked.
        fit=subject_fit,
        references=subject_references,
        recording=subject_recording,
        head_model=rules.prepare_head_model.output.folder,
    output:
        fit="<results>/{subject}/tracking/fit.npz",
        references="<results>/{subject}/tracking/reference_images.json",
        quality="<results>/{subject}/tracking/quality.json",
    log:
        text="<logs>/track_subject/{subject}.log",
    benchmark:
        "<benchmarks>/track_subject/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        version=STAGE_VERSIONS["track_subject"],
        settings=settings("tracking"),
    message:
        "{wildcards.subject}: tracking"
    script:
        "../workflow_scripts/track_subject.py"


rule track_driving:
    input:
        fit=driving_fit,
        recording=driving_recording,
        trajectory=driving_trajectory,
        head_model=rules.prepare_head_model.output.folder,
    output:
        fit="<results>/driving/{driving}/fit.npz",
        trajectory="<results>/driving/{driving}/trajectory.npz",
        quality="<results>/driving/{driving}/quality.json",
    log:
        text="<logs>/track_driving/{driving}.log",
    benchmark:
        "<benchmarks>/track_driving/{driving}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        version=STAGE_VERSIONS["track_driving"],
        settings=settings("tracking"),
        start_frame=lambda wildcards: driving_row(wildcards).start_frame,
        num_frames=lambda wildcards: driving_row(wildcards).num_frames,
    message:
        "{wildcards.driving}: tracking the driving sequence"
    script:
        "../workflow_scripts/track_driving.py"
