"""Evaluation: renders of the avatar against images that it was not fitted on."""


rule evaluate_avatar:
    input:
        avatar=rules.fit_avatar.output.avatar,
        description=rules.fit_avatar.output.description,
        references=reference_images,
        held_out=held_out_images,
        head_model=rules.prepare_head_model.output.folder,
        lpips=lpips_weights,
    output:
        metrics="<results>/{subject}/evaluation/metrics.json",
    log:
        text="<logs>/evaluate_avatar/{subject}.log",
    benchmark:
        "<benchmarks>/evaluate_avatar/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=8000,
        runtime=60,
    params:
        version=STAGE_VERSIONS["evaluate_avatar"],
        lower_jaw=CONFIG.settings.fitting.use_lower_jaw,
    message:
        "{wildcards.subject}: evaluating the avatar"
    script:
        "../workflow_scripts/evaluate_avatar.py"
