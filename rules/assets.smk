"""Assets that all subjects share: head model and diffusion weights."""


rule prepare_head_model:
    input:
        source=head_model_source,
        companions=head_model_companions,
    output:
        folder=directory("<results>/assets/head_model"),
    log:
        text="<logs>/prepare_head_model.log",
    benchmark:
        "<benchmarks>/prepare_head_model.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("prepare_head_model", 4000),
        runtime=minutes("prepare_head_model", 20),
    params:
        version=STAGE_VERSIONS["prepare_head_model"],
    message:
        "Preparing the head model"
    script:
        "../workflow_scripts/prepare_head_model.py"


rule prepare_mmdm:
    input:
        # Either weights that are here or downloaded ones.
        source=CONFIG.settings.mmdm.path or [],
        download=mmdm_download,
        head_model=rules.prepare_head_model.output.folder,
    output:
        folder=directory("<results>/assets/mmdm"),
    log:
        text="<logs>/prepare_mmdm.log",
    benchmark:
        "<benchmarks>/prepare_mmdm.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 2
    resources:
        mem_mb=memory("prepare_mmdm", 24000),
        runtime=minutes("prepare_mmdm", 60),
    params:
        version=STAGE_VERSIONS["prepare_mmdm"],
        sha256=CONFIG.settings.mmdm.sha256,
    message:
        "Preparing the diffusion weights"
    script:
        "../workflow_scripts/prepare_mmdm.py"
