"""`steer eval harness`: EleutherAI's lm-evaluation-harness on steered models; tasks for it that need no download."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from steer_demos.intervals import FIRST_SEED
from steer_demos.language_tasks import QUESTIONS, draw_questions

COUNT = 200  # with the seed, the questions of `steer eval llm --only choice`

# `prompt`, `answers` and `label` are fields of the lines of the data file.
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: answers
doc_to_target: label
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata:
  version: 1.0
"""


def write_tasks(folder: Path, count: int = COUNT, seed: int = FIRST_SEED) -> list[str]:
    """Write every question task as a task file of the harness, with its questions beside it.

    Args:
        folder: made if it does not exist; the task files name the data by its full path.
        count: questions of each task.
        seed: of the questions.

    Returns:
        The names of the tasks: `steer_sentiment` and others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task in QUESTIONS:
        name = f"steer_{task}"
        data = folder / f"{name}.jsonl"
        lines = (
            json.dumps({"prompt": prompt, "answers": answers, "label": label})
            for prompt, answers, label in draw_questions(task, count, seed)
        )
        data.write_text("\n".join(lines) + "\n")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=json.dumps(str(data.resolve()))))
        names.append(name)
    return names


def tasks_command(
    folder: Annotated[Path, typer.Argument(help="To write to.")],
    count: Annotated[int, typer.Option(help="Questions of each task.", min=1)] = COUNT,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = FIRST_SEED,
) -> None:
    """Write generated questions as task files of the lm-evaluation-harness."""
    names = write_tasks(folder, count, seed)
    print(f"{', '.join(names)}: {count} questions each, in {folder}")
    print(f"steer eval harness --model_args pretrained=MODEL --include_path {folder} --tasks {','.join(names)}")


def harness_command(arguments: Annotated[list[str] | None, typer.Argument(help="Of `lm_eval run`.")] = None) -> None:
    """Run the lm-evaluation-harness on a steered model; takes the arguments of `lm_eval run`.

    In --model_args: pretrained=MODEL, and artifact=FOLDER of a saved method, or method=NAME with its fields.
    """
    from lm_eval.__main__ import cli_evaluate

    from steer_demos import lm_eval_adapter  # noqa: F401  (the harness then knows the model)

    sys.argv = ["lm_eval", "run", "--model", "steer", *(arguments or ["--help"])]
    cli_evaluate()


# What follows goes to the harness as it stands, --help included.
HARNESS_CONTEXT = {"ignore_unknown_options": True, "help_option_names": []}
