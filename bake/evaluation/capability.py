"""What a model can do, by EleutherAI's harness: its tasks, its prompts, its metrics."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bake.errors import InputError

__all__ = ["compared", "measured", "need_harness"]

EXTRA = 'pip install -c constraints.txt -e ".[lm-eval]"'
# What the harness reports beside its metrics.
NO_METRICS = ("alias", "sample_len", "sample_count", "name")


def need_harness() -> None:
    """Raise InputError where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"--tasks: needs the extra `lm-eval`: {EXTRA}") from error


def measured(
    folder: Path, tasks: Sequence[str], limit: int | None = None, include: Path | None = None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task and metric the value and its standard error, of a checkpoint in transformers.

    `include` is a folder of further tasks' YAML. The chat template is not applied, which is the
    harness's default. Raises InputError for a task that there is not,
    or whose data cannot be had.
    """
    need_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [one for one in tasks if not manager.match_tasks([one])]
    if unknown:
        raise InputError(
            f"--tasks: the harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and "
            "--task-path adds a folder of your own"
        )
    arguments = {"pretrained": str(folder), "dtype": "auto", "trust_remote_code": False}
    try:
        found: Any = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=list(tasks),
            device="cpu",
            batch_size=8,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--tasks: the harness cannot run {', '.join(tasks)}: {reason}") from error
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`metric,filter` and `metric_stderr,filter` as pairs."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if metric in NO_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind in ("", "none") else f"{metric}, {kind}"
        stderr = float(error) if isinstance(error, int | float) else None
        found[name] = {"value": float(value), "stderr": stderr}
    return found


def compared(
    before: Mapping[str, Mapping[str, Any]] | None, after: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Both models' metrics side by side; `before` is None without a base."""
    return {
        task: {
            metric: {"before": (before or {}).get(task, {}).get(metric), "after": values}
            for metric, values in metrics.items()
        }
        for task, metrics in after.items()
    }
