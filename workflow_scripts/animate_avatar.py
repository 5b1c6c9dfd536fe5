"""Rule animate_avatar: an avatar driven by one sequence."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.animation.driver import animate
    from cap4d_core.animation.sound import driving_sound
    from cap4d_core.avatar.gaussians import GaussianAvatar
    from cap4d_core.files.basic import read_json
    from cap4d_core.files.tracking import read_fit, read_trajectory
    from cap4d_core.flame.model import HeadModel
    from cap4d_core.manifest import manifest
    from cap4d_core.settings import AnimationSettings

    fit, sound = read_fit(job.input_file("driving")), None
    if job.input_files("sound"):
        sound = driving_sound(job.input_file("sound"), fit, read_json(job.input_file("quality")))
    head_model = HeadModel.load(job.input_file("head_model"), lower_jaw=job.params["lower_jaw"])
    output = job.output_file("video").parent
    with manifest(job, output):
        animate(
            GaussianAvatar.load(job.input_file("avatar").parent, head_model, job.device),
            head_model,
            (fit, read_trajectory(job.input_file("trajectory"))),
            AnimationSettings(**job.params["settings"]),
            output,
            callback=job.progress("frames"),
            audio=sound,
        )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
