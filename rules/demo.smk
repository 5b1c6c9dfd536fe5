"""The demo world: procedural head model, subjects and motion, read like a user's own data."""


rule make_demo_head:
    output:
        folder=directory("<results>/demo/head"),
    log:
        text="<logs>/make_demo_head.log",
    benchmark:
        "<benchmarks>/make_demo_head.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("make_demo_head", 2000),
        runtime=minutes("make_demo_head", 20),
    params:
        version=STAGE_VERSIONS["make_demo"],
    message:
        "Making the demo head model"
    script:
        "../workflow_scripts/make_demo_head.py"


rule make_demo_subject:
    output:
        fit="<results>/demo/subjects/{subject}/fit.npz",
        references="<results>/demo/subjects/{subject}/reference_images.json",
    log:
        text="<logs>/make_demo_subject/{subject}.log",
    benchmark:
        "<benchmarks>/make_demo_subject/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("make_demo_subject", 2000),
        runtime=minutes("make_demo_subject", 20),
    params:
        version=STAGE_VERSIONS["make_demo"],
        seed=demo_seed,
        settings=settings("demo"),
    message:
        "{wildcards.subject}: making the demo subject"
    script:
        "../workflow_scripts/make_demo_subject.py"


rule make_demo_held_out:
    output:
        folder=directory("<results>/demo/held_out/{subject}"),
    log:
        text="<logs>/make_demo_held_out/{subject}.log",
    benchmark:
        "<benchmarks>/make_demo_held_out/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("make_demo_held_out", 2000),
        runtime=minutes("make_demo_held_out", 20),
    params:
        version=STAGE_VERSIONS["make_demo"],
        seed=demo_seed,
        settings=settings("demo"),
        crop_size=CONFIG.settings.sampling.resolution,
    message:
        "{wildcards.subject}: making held-out views of the demo subject"
    script:
        "../workflow_scripts/make_demo_held_out.py"


rule make_demo_driving:
    output:
        fit="<results>/demo/driving/{driving}/fit.npz",
        trajectory="<results>/demo/driving/{driving}/orbit.npz",
    log:
        text="<logs>/make_demo_driving/{driving}.log",
    benchmark:
        "<benchmarks>/make_demo_driving/{driving}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("make_demo_driving", 2000),
        runtime=minutes("make_demo_driving", 20),
    params:
        version=STAGE_VERSIONS["make_demo"],
        settings=settings("demo"),
    message:
        "{wildcards.driving}: making the demo motion"
    script:
        "../workflow_scripts/make_demo_driving.py"
