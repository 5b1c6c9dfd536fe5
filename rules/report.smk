"""Report: one page with all subjects, animations and figures."""


rule write_report:
    input:
        avatars=avatar_files(),
        animations=animation_files(),
        evaluations=evaluation_files(),
    output:
        page=report(
            "<results>/index.html",
            category="Overview",
            labels={"what": "all subjects"},
            caption="captions/page.rst",
        ),
    log:
        text="<logs>/write_report.log",
    benchmark:
        "<benchmarks>/write_report.tsv"
    localrule: True
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("write_report", 2000),
        runtime=minutes("write_report", 10),
    params:
        version=STAGE_VERSIONS["write_report"],
        results=lambda wildcards, output: str(Path(output.page).parent),
        animations={name: drivings_of(name) for name in CONFIG.subjects},
        configuration=CONFIG.settings.model_dump(mode="json"),
    message:
        "Writing the report"
    script:
        "../workflow_scripts/write_report.py"
