"""The commands `steer eval pictures`, `steer eval sparse`, `steer eval video` and `steer eval vlm`."""

import typer

from steer_demos import evaluate_pictures, evaluate_sparse, evaluate_video, evaluate_vlm

app = typer.Typer(no_args_is_help=True, help="Measure an embedded model, or a folder, on fixed prompts or scenes.")
app.command("pictures")(evaluate_pictures.evaluate_command)
app.command("sparse")(evaluate_sparse.evaluate_command)
app.command("video")(evaluate_video.evaluate_command)
app.command("vlm")(evaluate_vlm.evaluate_command)


if __name__ == "__main__":
    app()
