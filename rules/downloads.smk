"""Weights from the network, where the configuration asks for them."""


# Local rules: the nodes of a cluster often have no way out. What arrives is kept beside the declared
# output, which Snakemake deletes before a job, so that an interrupted download goes on.
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
