"""Reference images without a diffusion model (sampling.num_views: 0)."""


rule crop_references:
    input:
        fit=kept_fit,
        references=kept_references,
        head_model=rules.prepare_head_model.output.folder,
    output:
        index="<results>/{subject}/crops/index.json",
    log:
        text="<logs>/crop_references/{subject}.log",
    benchmark:
        "<benchmarks>/crop_references/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("crop_references", 4000),
        runtime=minutes("crop_references", 30),
    params:
        version=STAGE_VERSIONS["encode_references"],
        settings=settings("sampling"),
    message:
        "{wildcards.subject}: cropping the references"
    script:
        "../workflow_scripts/crop_references.py"
