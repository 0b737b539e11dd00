"""An evaluation from what was named to a table and a file of evidence."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.errors import InputError
from bake.evaluation import capability
from bake.evaluation.disjoint import Proof, check_splits, proved
from bake.evaluation.opened import Named, Opened, Source, opened, replies, source_of
from bake.evaluation.result import FORMAT, Evaluation
from bake.evaluation.run import Asking, evaluate
from bake.evaluation.sets import Asked, chosen_sets
from bake.evaluation.subject import Manner
from bake.judge.choice import find_asker, find_judge
from bake.judge.thinking import Thinking
from bake.manifest import file_hash, versions
from bake.staging import check_file, staged_file
from bake.work import Work

__all__ = ["Wanted", "evaluate_to_file"]

CHECKPOINTS = "--tasks: the harness runs checkpoints; give a folder or a Hub id"


@dataclass(frozen=True)
class Wanted:
    """What is asked: `sets` by name, all without; `limit` prompts of each; answers of `tokens`.

    `thinking` lists the settings of a template's switch that are tried, and leaves it alone where
    it is empty. `tasks` are the harness's, `task_limit` documents of each, `task_path` a folder of
    further ones. `fresh` asks again for what is cached.
    """

    sets: tuple[str, ...] = ()
    limit: int | None = None
    tokens: int = 128
    thinking: tuple[bool, ...] = ()
    fresh: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    task_path: Path | None = None


def evaluate_to_file(
    given: Named,
    wanted: Wanted,
    output: Path | None = None,
    overwrite: bool = False,
    show: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate what was named, show the table, and write the evidence where there is an `output`.

    Every set is proved disjoint from what the recipe's fit and search see before anything is
    asked. Answers are kept as they come, so that a run which was cut off goes on. The processes of
    `accelerate launch` share the prompts, and one of them judges, shows and writes. Raises an
    InputError for what cannot be found, asked or judged; the file appears when it is complete.
    """
    work = Work.launched()
    with work.main_first():
        if output and work.main:
            check_file(output, overwrite)
        if wanted.tasks:
            capability.need_harness()
        if wanted.tasks and (given.hooks or given.server):
            raise InputError(CHECKPOINTS)
        source = source_of(given)
        if source.manifest is not None:
            check_splits(source.splits, source.manifest, str(source.place))
        sets = chosen_sets(source.recipe, source.splits, wanted.sets, wanted.limit)
        proof = proved(sets, source.splits, source.manifest is not None)
    with opened(given, source, wanted.fresh, work) as subjects:
        if wanted.tasks and subjects.folder is None:
            raise InputError(CHECKPOINTS)
        found = _evaluated(source, subjects, wanted, sets, proof, work)
        if work.main:
            show(found.table())
            if output:
                values = {**_about(source, subjects, wanted), **found.as_json()}
                text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
                with staged_file(output, overwrite) as staging:
                    staging.write_text(f"{text}\n", encoding="utf-8", errors="replace")
    work.wait()
    return found


def _evaluated(
    source: Source,
    subjects: Opened,
    wanted: Wanted,
    sets: Sequence[Asked],
    proof: Proof,
    work: Work,
) -> Evaluation:
    recipe = source.recipe
    marks = Thinking(recipe.judge.thinking.begin, recipe.judge.thinking.end)
    modes: Sequence[bool | None] = wanted.thinking or (None,)
    asking = Asking(
        sets,
        source.splits["text"].test[: wanted.limit],
        [Manner(wanted.tokens, recipe.system_prompt, mode, marks) for mode in modes],
        *(find_judge(recipe.judge), find_asker(recipe.judge), replies(wanted.fresh)),
        *(proof, work),
    )
    found = evaluate(subjects.base, subjects.model, asking)
    if not wanted.tasks:
        return found
    return replace(found, capability=work.by_main(lambda: _capability(subjects, wanted)))


def _capability(subjects: Opened, wanted: Wanted) -> dict[str, Any]:
    """What the harness says of both checkpoints."""
    how = (wanted.tasks, wanted.task_limit, wanted.task_path)
    base, folder = subjects.base_folder, subjects.folder
    assert folder is not None
    before = capability.measured(base, *how) if base else None
    return capability.compared(before, capability.measured(folder, *how))


def _about(source: Source, subjects: Opened, wanted: Wanted) -> dict[str, Any]:
    """What was evaluated, and how."""
    recipe, base, model = source.recipe, subjects.base, subjects.model
    return {
        "format": FORMAT,
        "version": 1,
        "model": {"name": model.name, "runtime": model.runtime, "identity": model.identity},
        "base": {"name": base.name, "runtime": base.runtime, "identity": base.identity}
        if base
        else None,
        "bake": file_hash(source.place) if source.place else None,
        "recipe": {"name": recipe.name, "sha256": source.loaded.sha256},
        "judge": {"kind": recipe.judge.kind, "model": recipe.judge.model},
        "answer_tokens": wanted.tokens,
        "limit": wanted.limit,
        "system_prompt": recipe.system_prompt,
        "versions": versions(),
    }
