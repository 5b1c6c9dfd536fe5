"""Fitting: a Gaussian avatar from reference and generated images."""


rule fit_avatar:
    input:
        references=reference_images,
        generated=generated_images,
        head_model=rules.prepare_head_model.output.folder,
        lpips=lpips_weights,
    output:
        avatar="<results>/{subject}/avatar/avatar.safetensors",
        description="<results>/{subject}/avatar/avatar.json",
        metrics="<results>/{subject}/avatar/metrics.json",
    log:
        text="<logs>/fit_avatar/{subject}.log",
    benchmark:
        "<benchmarks>/fit_avatar/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=24000,
        runtime=360,
    params:
        version=STAGE_VERSIONS["fit_avatar"],
        settings=settings("fitting"),
    message:
        "{wildcards.subject}: fitting the avatar"
    script:
        "../workflow_scripts/fit_avatar.py"
