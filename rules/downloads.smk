"""Weights from the network, where the configuration asks for them."""


# Local rules: the nodes of a cluster often have no way out. What arrives is kept beside the declared
# output, which Snakemake deletes before a job, so that an interrupted download goes on.
# Credentials come from the environment or netrc of the process itself: params are written to files.
rule download_flame:
    output:
        model="<results>/assets/downloads/flame/flame.npz",
    log:
        text="<logs>/download_flame.log",
    benchmark:
        "<benchmarks>/download_flame.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        version=STAGE_VERSIONS["download_flame"],
        url=CONFIG.settings.head_model.url,
        sha256=CONFIG.settings.head_model.sha256,
        retries=5,
    message:
        "Downloading the FLAME head model"
    script:
        "../workflow_scripts/download_flame.py"


rule download_companions:
    output:
        record="<results>/assets/downloads/companions/download.json",
    log:
        text="<logs>/download_companions.log",
    benchmark:
        "<benchmarks>/download_companions.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=30,
    params:
        version=STAGE_VERSIONS["download_companions"],
        url=CONFIG.settings.head_model.companions_url,
        sha256=CONFIG.settings.head_model.companions_sha256,
        retries=5,
    message:
        "Downloading the companion files of the head model"
    script:
        "../workflow_scripts/download_companions.py"


rule download_networks:
    output:
        record="<results>/assets/downloads/networks/download.json",
    log:
        text="<logs>/download_networks.log",
    benchmark:
        "<benchmarks>/download_networks.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        version=STAGE_VERSIONS["download_networks"],
        url=CONFIG.settings.tracking.networks_url,
        sha256=CONFIG.settings.tracking.networks_sha256,
        retries=5,
    message:
        "Downloading the face networks"
    script:
        "../workflow_scripts/download_networks.py"


rule download_mmdm:
    output:
        record="<results>/assets/downloads/mmdm/download.json",
    log:
        text="<logs>/download_mmdm.log",
    benchmark:
        "<benchmarks>/download_mmdm.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=600,
    params:
        version=STAGE_VERSIONS["download_mmdm"],
        url=CONFIG.settings.mmdm.url,
        config_url=CONFIG.settings.mmdm.config_url,
        sha256=CONFIG.settings.mmdm.sha256,
        retries=5,
    message:
        "Downloading the diffusion weights"
    script:
        "../workflow_scripts/download_mmdm.py"


rule download_lpips:
    output:
        weights="<results>/assets/lpips/vgg.safetensors",
    log:
        text="<logs>/download_lpips.log",
    benchmark:
        "<benchmarks>/download_lpips.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
    params:
        version=STAGE_VERSIONS["download_lpips"],
        url=CONFIG.settings.fitting.lpips_url,
        retries=5,
    message:
        "Downloading the LPIPS weights"
    script:
        "../workflow_scripts/download_lpips.py"
