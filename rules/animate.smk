"""Animation: drive an avatar with the motion and camera of a driving sequence."""


rule animate_avatar:
    input:
        avatar=rules.fit_avatar.output.avatar,
        description=rules.fit_avatar.output.description,
        driving=rules.track_driving.output.fit,
        trajectory=rules.track_driving.output.trajectory,
        quality=rules.track_driving.output.quality,
        sound=driving_video,
        head_model=rules.prepare_head_model.output.folder,
    output:
        video=report(
            "<results>/{subject}/animation/{driving}/renders.mp4",
            category="Animations",
            labels={"subject": "{subject}", "driven by": "{driving}", "what": "video"},
            caption="captions/animation.rst",
        ),
        description="<results>/{subject}/animation/{driving}/animation.json",
        manifest=report(
            "<results>/{subject}/animation/{driving}/manifest.json",
            category="Animations",
            labels={
                "subject": "{subject}",
                "driven by": "{driving}",
                "what": "manifest",
            },
            caption="captions/manifest.rst",
        ),
    log:
        text="<logs>/animate_avatar/{subject}/{driving}.log",
    benchmark:
        "<benchmarks>/animate_avatar/{subject}/{driving}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("animate_avatar", 16000),
        runtime=minutes("animate_avatar", 120),
    params:
        version=STAGE_VERSIONS["animate_avatar"],
        lower_jaw=CONFIG.settings.fitting.use_lower_jaw,
        settings=settings("animation"),
    message:
        "{wildcards.subject}: animating with {wildcards.driving}"
    script:
        "../workflow_scripts/animate_avatar.py"
