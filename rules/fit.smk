"""Avatars: fitted to reference and generated images, or taken over from elsewhere."""


rule fit_avatar:
    input:
        references=reference_images,
        generated=generated_images,
        head_model=rules.prepare_head_model.output.folder,
        lpips=lpips_weights,
    output:
        avatar="<results>/{subject}/avatar/avatar.safetensors",
        description="<results>/{subject}/avatar/avatar.json",
        manifest=report(
            "<results>/{subject}/avatar/manifest.json",
            category="Avatars",
            labels={"subject": "{subject}", "what": "manifest"},
            caption="captions/manifest.rst",
        ),
        metrics="<results>/{subject}/avatar/metrics.json",
        curves=report(
            "<results>/{subject}/avatar/metrics.png",
            category="Avatars",
            labels={"subject": "{subject}", "what": "fit"},
            caption="captions/fit.rst",
        ),
    log:
        text="<logs>/fit_avatar/{subject}.log",
    benchmark:
        "<benchmarks>/fit_avatar/{subject}.tsv"
    wildcard_constraints:
        subject=pattern_without(CONFIG.imported),
    conda:
        "../envs/torch.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=memory("fit_avatar", 24000),
        runtime=minutes("fit_avatar", 360),
    params:
        version=STAGE_VERSIONS["fit_avatar"],
        settings=settings("fitting"),
    message:
        "{wildcards.subject}: fitting the avatar"
    script:
        "../workflow_scripts/fit_avatar.py"


# The same files as of fit_avatar, of other subjects.
rule import_avatar:
    input:
        source=ready_avatar,
        head_model=rules.prepare_head_model.output.folder,
    output:
        avatar="<results>/{subject}/avatar/avatar.safetensors",
        description="<results>/{subject}/avatar/avatar.json",
        manifest=report(
            "<results>/{subject}/avatar/manifest.json",
            category="Avatars",
            labels={"subject": "{subject}", "what": "manifest"},
            caption="captions/manifest.rst",
        ),
    log:
        text="<logs>/import_avatar/{subject}.log",
    benchmark:
        "<benchmarks>/import_avatar/{subject}.tsv"
    wildcard_constraints:
        subject=pattern_of(CONFIG.imported),
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("import_avatar", 8000),
        runtime=minutes("import_avatar", 20),
    params:
        version=STAGE_VERSIONS["import_avatar"],
        files=avatar_state,
        lower_jaw=CONFIG.settings.fitting.use_lower_jaw,
    message:
        "{wildcards.subject}: importing the avatar"
    script:
        "../workflow_scripts/import_avatar.py"
