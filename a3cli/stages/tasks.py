"""Run tasks of the lm-evaluation-harness on loaded models. The only importer of `lm_eval`, an optional extra."""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from a3cli.errors import A3Error, first_line
from a3cli.settings import EvalSettings
from a3cli.work.files import Json

log = logging.getLogger(__name__)


def open_tasks(settings: EvalSettings) -> Any:
    """Return the harness's task manager for the requested tasks, or None without tasks.

    Raises A3Error if the harness is not installed or does not know a task.
    """
    if not settings.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise A3Error("--tasks needs the lm-evaluation-harness, which is not installed: pip install 'a3cli[lm-eval]'")
    if settings.tasks_path and not settings.tasks_path.is_dir():
        raise A3Error(f"--tasks-path {settings.tasks_path}: no such folder")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    unknown: list[str] = []
    for defaults in (False, True) if settings.tasks_path else (True,):  # listing its own tasks takes long
        try:
            manager = TaskManager(include_path=settings.tasks_path, include_defaults=defaults)
        except Exception as error:  # the user's YAML files
            raise A3Error(f"--tasks-path {settings.tasks_path}: {first_line(error)}") from error
        unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise A3Error(
        f"--tasks: the lm-evaluation-harness has no {', '.join(unknown)} (tasks of your own: --tasks-path FOLDER)"
    )


def run_tasks(manager: Any, model: Any, tokenizer: Any, settings: EvalSettings, name: str) -> Json:
    """Return each task's figures and standard errors, with the harness's names, and its number of documents.

    Raises A3Error if a task cannot be run: its data could not be downloaded, or the model does not support it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    log.info("%s: tasks %s", name, ", ".join(settings.tasks))
    try:
        with harness_output():
            result = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
                tasks=list(settings.tasks),
                task_manager=manager,
                limit=settings.task_limit,
                log_samples=False,
            )
    except Exception as error:  # tasks are other people's data and programs
        raise A3Error(f"{name}: the tasks {', '.join(settings.tasks)} failed: {first_line(error)}") from error
    return {task: figures_of(task, found, result) for task, found in sorted(result["results"].items())}


@contextlib.contextmanager
def harness_output() -> Iterator[None]:
    """Send the harness's output, mostly progress bars, to stderr, and only to a terminal with progress enabled."""
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def figures_of(task: str, found: Json, result: Json) -> Json:
    """Return `acc`, `acc_stderr` and the like; with several filters, the filter's name follows after a comma."""
    figures = {
        key.removesuffix(",none"): value
        for key, value in found.items()
        if isinstance(value, (int, float)) and "," in key
    }
    return {"documents": result.get("n-samples", {}).get(task, {}).get("effective"), **figures}
