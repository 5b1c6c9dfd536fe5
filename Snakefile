"""From portraits to animatable Gaussian avatars: see README.md and docs/usage.md."""

from snakemake.utils import min_version

min_version("9.19")


# A file given with --configfile replaces config.yaml; merging them would mix two experiments.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


report: "rules/captions/workflow.rst"


include: "rules/common.smk"
include: "rules/downloads.smk"
include: "rules/assets.smk"
include: "rules/demo.smk"
include: "rules/track.smk"
include: "rules/references.smk"
include: "rules/sample.smk"
include: "rules/fit.smk"
include: "rules/animate.smk"
include: "rules/evaluate.smk"
include: "rules/train.smk"
include: "rules/report.smk"


# Every file of the run is requested, not only the last ones: one that was deleted is then made
# again, and what depends on it.
rule all:
    default_target: True
    input:
        tracked_files(),
        sampled_files(),
        avatar_files(),
        animation_files(),
        evaluation_files(),
        rules.write_report.output.page,


rule track_all:
    input:
        tracked_files(),


rule sample_all:
    input:
        sampled_files(),


rule fit_all:
    input:
        avatar_files(),


rule animate_all:
    input:
        animation_files(),


rule evaluate_all:
    input:
        evaluation_files(),


onstart:
    claim_results(RESULTS, log)
    before_run(CONFIG, workflow)


onsuccess:
    after_success(CONFIG)


onerror:
    after_failure(CONFIG)
