"""Rule plan_views: which views to generate of one subject."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.diffusion.view_plan import plan_views
    from cap4d_core.settings import SamplingSettings

    plan_views(
        job.input_file("fit").parent,
        job.input_file("head_model"),
        job.output_file("plan"),
        SamplingSettings(**job.params["settings"]),
        job.wildcards["subject"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
