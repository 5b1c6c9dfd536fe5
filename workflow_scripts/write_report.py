"""Rule write_report: one page with all subjects, animations and figures."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.job_environment import package_versions
    from cap4d_core.report.report import write_report

    page = job.output_file("page")
    write_report(
        page,
        job.params["results"],
        job.params["animations"],
        settings=job.params["configuration"],
        versions=package_versions(),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
