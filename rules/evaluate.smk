"""Evaluation: avatars against images that they were not fitted on, and driven by others."""


rule hold_out:
    input:
        fit=rules.track_subject.output.fit,
        references=rules.track_subject.output.references,
        quality=rules.track_subject.output.quality,
        head_model=rules.prepare_head_model.output.folder,
    output:
        # images/ and bg/ beside them are links to the tracked frames.
        fit="<results>/{subject}/hold_out/fit.npz",
        references="<results>/{subject}/hold_out/reference_images.json",
        split="<results>/{subject}/hold_out/split.json",
        held_out=directory("<results>/{subject}/hold_out/held_out"),
    log:
        text="<logs>/hold_out/{subject}.log",
    benchmark:
        "<benchmarks>/hold_out/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("hold_out", 4000),
        runtime=minutes("hold_out", 30),
    params:
        version=STAGE_VERSIONS["hold_out"],
        protocol=CONFIG.settings.evaluation.protocol,
        fraction=CONFIG.settings.evaluation.fraction,
        seed=CONFIG.settings.evaluation.seed,
        resolution=CONFIG.settings.sampling.resolution,
    message:
        "{wildcards.subject}: setting frames aside"
    script:
        "../workflow_scripts/hold_out.py"


rule evaluate_avatar:
    input:
        avatar=rules.fit_avatar.output.avatar,
        description=rules.fit_avatar.output.description,
        references=reference_images,
        held_out=held_out_images,
        split=held_out_split,
        head_model=rules.prepare_head_model.output.folder,
        lpips=lpips_weights,
        identity=identity_model,
    output:
        metrics="<results>/{subject}/evaluation/metrics.json",
        pictures=report(
            "<results>/{subject}/evaluation/side_by_side.png",
            category="Evaluation",
            labels={"subject": "{subject}"},
            caption="captions/evaluation.rst",
        ),
    log:
        text="<logs>/evaluate_avatar/{subject}.log",
    benchmark:
        "<benchmarks>/evaluate_avatar/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("evaluate_avatar", 8000),
        runtime=minutes("evaluate_avatar", 60),
    params:
        version=STAGE_VERSIONS["evaluate_avatar"],
        files=held_out_state,
        lower_jaw=CONFIG.settings.fitting.use_lower_jaw,
        settings=settings("evaluation"),
    message:
        "{wildcards.subject}: evaluating the avatar"
    script:
        "../workflow_scripts/evaluate_avatar.py"


rule make_demo_performance:
    input:
        driving=rules.track_driving.output.fit,
    output:
        folder=directory("<results>/demo/performances/{subject}/{driving}"),
    log:
        text="<logs>/make_demo_performance/{subject}/{driving}.log",
    benchmark:
        "<benchmarks>/make_demo_performance/{subject}/{driving}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("make_demo_performance", 2000),
        runtime=minutes("make_demo_performance", 20),
    params:
        version=STAGE_VERSIONS["make_demo"],
        seed=demo_seed,
        crop_size=CONFIG.settings.sampling.resolution,
        max_frames=CONFIG.settings.evaluation.max_frames,
    message:
        "{wildcards.subject}: making true pictures of {wildcards.driving}"
    script:
        "../workflow_scripts/make_demo_performance.py"


rule evaluate_reenactment:
    input:
        avatar=rules.fit_avatar.output.avatar,
        description=rules.fit_avatar.output.description,
        references=reference_images,
        driving=rules.track_driving.output.fit,
        truth=true_performance,
        landmarks=rules.place_landmarks.output.landmarks,
        head_model=rules.prepare_head_model.output.folder,
        lpips=lpips_weights,
        identity=identity_model,
    output:
        metrics="<results>/{subject}/reenactment/{driving}/metrics.json",
    log:
        text="<logs>/evaluate_reenactment/{subject}/{driving}.log",
    benchmark:
        "<benchmarks>/evaluate_reenactment/{subject}/{driving}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("evaluate_reenactment", 8000),
        runtime=minutes("evaluate_reenactment", 60),
    params:
        version=STAGE_VERSIONS["evaluate_reenactment"],
        lower_jaw=CONFIG.settings.fitting.use_lower_jaw,
        settings=settings("evaluation"),
    message:
        "{wildcards.subject}: evaluating the avatar driven by {wildcards.driving}"
    script:
        "../workflow_scripts/evaluate_reenactment.py"


# Not part of the whole: `snakemake evaluate` asks for it.
rule evaluate:
    input:
        subjects=collect(rules.evaluate_avatar.output.metrics, subject=CONFIG.evaluated),
        reenactments=reenactment_files(),
    output:
        summary="<results>/evaluation/summary.json",
    log:
        text="<logs>/evaluate.log",
    benchmark:
        "<benchmarks>/evaluate.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("evaluate", 2000),
        runtime=minutes("evaluate", 10),
    params:
        version=STAGE_VERSIONS["evaluate"],
        subjects=CONFIG.evaluated,
        reenactments=CONFIG.reenacted,
    message:
        "Summarising the evaluations"
    script:
        "../workflow_scripts/evaluate.py"
