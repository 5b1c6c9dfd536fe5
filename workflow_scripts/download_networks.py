"""Rule download_networks: face networks that replace the shipped ones."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.tracking.face_models_download import download_networks

    download_networks(
        job.params["url"],
        job.output_file("record"),
        job.params["sha256"],
        callback=job.progress("download"),
        retries=job.params["retries"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
