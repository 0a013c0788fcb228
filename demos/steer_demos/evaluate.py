"""The commands of `steer eval`."""

import typer

from steer_demos import (
    evaluate_harness,
    evaluate_heads,
    evaluate_llm,
    evaluate_pictures,
    evaluate_sparse,
    evaluate_video,
    evaluate_vlm,
)

app = typer.Typer(no_args_is_help=True, help="Measure an embedded model, or a folder, on fixed prompts or scenes.")
app.command("harness", context_settings=evaluate_harness.HARNESS_CONTEXT)(evaluate_harness.harness_command)
app.command("heads")(evaluate_heads.evaluate_command)
app.command("llm")(evaluate_llm.evaluate_command)
app.command("pictures")(evaluate_pictures.evaluate_command)
app.command("sparse")(evaluate_sparse.evaluate_command)
app.command("tasks")(evaluate_harness.tasks_command)
app.command("video")(evaluate_video.evaluate_command)
app.command("vlm")(evaluate_vlm.evaluate_command)


if __name__ == "__main__":
    app()
