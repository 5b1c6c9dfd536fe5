"""Sampling: plan the views, encode the references, sample round by round and shard by shard."""


rule plan_views:
    input:
        fit=kept_fit,
        references=kept_references,
        head_model=rules.prepare_head_model.output.folder,
        own_plan=own_plan,
    output:
        plan="<results>/{subject}/views/plan.npz",
    log:
        text="<logs>/plan_views/{subject}.log",
    benchmark:
        "<benchmarks>/plan_views/{subject}.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("plan_views", 4000),
        runtime=minutes("plan_views", 20),
    params:
        version=STAGE_VERSIONS["plan_views"],
        settings=settings("sampling"),
    message:
        "{wildcards.subject}: planning the views"
    script:
        "../workflow_scripts/plan_views.py"


rule encode_references:
    input:
        fit=kept_fit,
        references=kept_references,
        head_model=rules.prepare_head_model.output.folder,
        mmdm=rules.prepare_mmdm.output.folder,
    output:
        latents="<results>/{subject}/views/reference_images/latents.safetensors",
        index="<results>/{subject}/views/reference_images/index.json",
    log:
        text="<logs>/encode_references/{subject}.log",
    benchmark:
        "<benchmarks>/encode_references/{subject}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("encode_references", 16000),
        runtime=minutes("encode_references", 30),
    params:
        version=STAGE_VERSIONS["encode_references"],
        settings=settings("sampling"),
    message:
        "{wildcards.subject}: encoding the references"
    script:
        "../workflow_scripts/encode_references.py"


rule sample_views:
    input:
        plan=rules.plan_views.output.plan,
        references=rules.encode_references.output.latents,
        head_model=rules.prepare_head_model.output.folder,
        mmdm=rules.prepare_mmdm.output.folder,
        previous=previous_round,
    output:
        latents=intermediate(
            "<results>/{subject}/views/rounds/{round}/{scatteritem}.safetensors"
        ),
    log:
        text="<logs>/sample_views/{subject}/{round}/{scatteritem}.log",
    benchmark:
        "<benchmarks>/sample_views/{subject}/{round}/{scatteritem}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("sample_views", 16000),
        runtime=minutes("sample_views", 120),
    params:
        version=STAGE_VERSIONS["sample_views"],
        settings=settings("sampling"),
    message:
        "{wildcards.subject}: sampling views, round {wildcards.round}, shard {wildcards.scatteritem}"
    script:
        "../workflow_scripts/sample_views.py"


rule decode_views:
    input:
        plan=rules.plan_views.output.plan,
        latents=last_round_shard,
        mmdm=rules.prepare_mmdm.output.folder,
    output:
        # The images go to a folder that all shards share, so only this list of them is declared.
        index="<results>/{subject}/views/generated_images/index/{scatteritem}.json",
    log:
        text="<logs>/decode_views/{subject}/{scatteritem}.log",
    benchmark:
        "<benchmarks>/decode_views/{subject}/{scatteritem}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("decode_views", 16000),
        runtime=minutes("decode_views", 60),
    params:
        version=STAGE_VERSIONS["decode_views"],
        settings=settings("sampling"),
    message:
        "{wildcards.subject}: decoding views, shard {wildcards.scatteritem}"
    script:
        "../workflow_scripts/decode_views.py"
