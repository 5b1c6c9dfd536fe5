"""Rule download_flame: the head model from its site; the login is in the environment or netrc."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.flame.flame_download import download_flame

    output = job.output_file("model")
    download_flame(
        job.params["url"],
        output,
        output.parent,
        job.params["sha256"],
        callback=job.progress("download"),
        retries=job.params["retries"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
