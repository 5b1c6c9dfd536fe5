"""Rule train_mmdm: a multi-view diffusion model, trained on tracked or procedural people."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from functools import partial

    from cap4d_core.avatar.lpips import Lpips
    from cap4d_core.diffusion.training.train import train_mmdm
    from cap4d_core.training_settings import TrainingSettings

    lpips = job.input_files("lpips")
    train_mmdm(
        TrainingSettings(**job.params["settings"]),
        job.input_file("head_model"),
        job.output_file("model").parent,
        device=job.device,
        num_processes=max(1, job.num_gpus),
        threads=job.threads,
        make_perceptual=partial(Lpips.load, lpips[0]) if lpips else None,
        callback=job.progress("training"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
