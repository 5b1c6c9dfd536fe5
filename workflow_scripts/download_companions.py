"""Rule download_companions: the public companion files of the head model."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.flame.companions_download import download_companions

    download_companions(
        job.params["url"],
        job.output_file("record"),
        job.params["sha256"],
        callback=job.progress("download"),
        retries=job.params["retries"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
