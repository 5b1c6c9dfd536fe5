"""Rule write_report: one page with all subjects, animations and figures."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.report.page import write_report

    write_report(job.output_file("page").parent)


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
