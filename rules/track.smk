"""Tracking: head-model fits of the subjects and of the driving sequences."""


# Once per head model: subjects, motions and evaluations share it.
rule place_landmarks:
    input:
        head_model=rules.prepare_head_model.output.folder,
        networks=face_networks,
    output:
        landmarks="<results>/assets/landmarks/correspondence.npz",
        picture="<results>/assets/landmarks/correspondence.png",
    log:
        text="<logs>/place_landmarks.log",
    benchmark:
        "<benchmarks>/place_landmarks.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("place_landmarks", 3000),
        runtime=minutes("place_landmarks", 20),
    params:
        version=STAGE_VERSIONS["place_landmarks"],
    message:
        "Placing the landmarks on the head model"
    script:
        "../workflow_scripts/place_landmarks.py"


rule track_subject:
    input:
        # Either a ready fit or what is to be tracked.
        fit=subject_fit,
        references=subject_references,
        recording=subject_recording,
        landmarks=subject_landmarks,
        networks=face_networks,
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
        mem_mb=memory("track_subject", 8000),
        runtime=minutes("track_subject", 120),
    params:
        version=STAGE_VERSIONS["track_subject"],
        files=subject_files,
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
        landmarks=driving_landmarks,
        networks=face_networks,
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
        mem_mb=memory("track_driving", 8000),
        runtime=minutes("track_driving", 120),
    params:
        version=STAGE_VERSIONS["track_driving"],
        settings=settings("tracking"),
        start_frame=lambda wildcards: driving_row(wildcards).start_frame,
        num_frames=lambda wildcards: driving_row(wildcards).num_frames,
    message:
        "{wildcards.driving}: tracking the driving sequence"
    script:
        "../workflow_scripts/track_driving.py"
