"""Training of a diffusion model of one's own: snakemake train_mmdm (docs/training.md)."""


# What an interrupted run goes on from lies beside the outputs and is not declared: Snakemake
# deletes outputs before a job. With resources gpu=n, n processes train together.
rule train_mmdm:
    input:
        head_model=rules.prepare_head_model.output.folder,
        fits=training_fits,
        start=training_start,
        lpips=training_lpips,
    output:
        model=directory(f"{training_folder()}/model"),
        metrics=f"{training_folder()}/metrics.jsonl",
        curve=f"{training_folder()}/curve.png",
        samples=f"{training_folder()}/samples.png",
    log:
        text=f"<logs>/train_mmdm/{CONFIG.settings.training.name}.log",
    benchmark:
        f"<benchmarks>/train_mmdm/{CONFIG.settings.training.name}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 8
    resources:
        gpu=1,
        # Not learned from earlier runs: one that goes on from a state is short.
        mem_mb=per_attempt(48000),
        runtime=per_attempt(1440),
    params:
        version=STAGE_VERSIONS["train_mmdm"],
        settings=settings("training"),
    message:
        "Training a diffusion model"
    script:
        "../workflow_scripts/train_mmdm.py"
