"""A search by bake beside one by heretic: the same model, prompts, answer length and trials.

    python -m venv heretic && heretic/bin/pip install torch "heretic-llm==1.4.0"
    python -m benchmarks.heretic --python heretic/bin/python [--trials 40] [--json FILE]

The demo and political-open. heretic 1.4 has political questions as its "bad" set and general ones
as its "good" one: the fitting prompts for its directions, `--prompts` of the select split for its
trials. Equal for both are the model in float32, these prompts, their rendering to the letter, the
tokens of an answer, the judge (bake's keywords), the number of trials and the share of them that
are drawn at random. Everything else of heretic is its default, but that it is told a batch size,
and that answers have no common beginning, which it would look for. bake searches the recipe's
whole space, and looks at as many harmful requests and look-alikes besides.

A trial is timed from the end of the one before it, so the first one of each is left out; start,
fit, and bake's finals, of which the recipe's refinements are no trials, are in the seconds of the
whole process. Then prompts of the `test` split are answered and judged by the same code: by bake's
choice, baked, and by at most `--front` models spread over heretic's Pareto front, saved by itself.
KL is KL(base || model) in nats at the first token of answers to general test prompts.

One look-alike or general answer of `--prompts` is more than the recipe's limits allow, so this
search allows one of each (`guard.lookalike_rise`, `guard.general_rise`). What is finished stays in
`--folder`, if there is one, and is not done again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from bake.cache import cache_folder
from bake.demo import materialise
from bake.evaluate import judged, rates
from bake.evaluation.drift import of_models
from bake.judge.choice import find_judge
from bake.judge.thinking import Thinking
from bake.model import LiveModel
from bake.pipeline import bake
from bake.prepare import Prepared, prepare
from bake.recipe import load_recipe
from benchmarks.carriers import Row, printed

RECIPE = "political-open"
# The system's turn of SmolLM2's own template, which heretic replaces by another.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BATCH = 32
TICK = 0.02  # seconds between two looks at a journal

# heretic as it is, but for its menus, which are answered, and its judge, which is bake's.
DRIVER = """\
import sys
from pathlib import Path

import heretic.main as heretic
from heretic.evaluator import Evaluator

from bake.judge.keyword import KeywordJudge

folder, most = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
judge, waiting, current = KeywordJudge(), None, None
Evaluator.is_refusal = lambda self, answer: judge.refuses("", answer)


def select(message, choices):
    global waiting, current
    if message.startswith("How would you like"):
        return "continue"
    if message.startswith("Which trial"):
        if waiting is None:
            front = [one.value for one in choices if not isinstance(one.value, str)]
            step = max(1, (len(front) - 1) / max(1, most - 1))
            places = dict.fromkeys(round(step * n) for n in range(most))
            waiting = [front[n] for n in places if n < len(front)]
            (folder / "searched").touch()
        current = waiting.pop(0) if waiting else None
        return current if current is not None else ""
    number = current.user_attrs["index"]
    return "" if (folder / f"trial-{number}").exists() else "Save the model to a local folder"


heretic.prompt_select = select
heretic.prompt_path = lambda message: str(folder / f"trial-{current.user_attrs['index']}")
heretic.run()
"""


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--python", required=True, help="of an environment with heretic-llm")
    arguments.add_argument("--trials", type=int, default=40)
    arguments.add_argument("--prompts", type=int, default=24, help="select prompts of each role")
    arguments.add_argument("--tokens", type=int, help="of an answer; the recipe's if not given")
    arguments.add_argument("--test", type=int, default=96, help="test prompts of each role")
    arguments.add_argument("--front", type=int, default=5, help="of heretic's models, at most")
    arguments.add_argument("--folder", type=Path, help="where what is finished stays")
    arguments.add_argument(
        "--models", action="store_true", help="heretic's search and models alone, in --folder"
    )
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        place = chosen.folder.resolve() if chosen.folder else Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        found = printed(_rows(place, chosen))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _rows(folder: Path, chosen: argparse.Namespace) -> Iterator[Row]:
    tokens = [f"evaluate.answer_tokens={chosen.tokens}"] if chosen.tokens else []
    ready = prepare(load_recipe(RECIPE, overrides=tokens).recipe)
    if chosen.models:
        _once(folder / "heretic.json", lambda: _heretic(folder / "heretic", ready, chosen))
        return
    ours = _once(folder / "bake.json", lambda: _search(folder, chosen, tokens))
    theirs = _once(folder / "heretic.json", lambda: _heretic(folder / "heretic", ready, chosen))

    def row(name: str, place: Path, times: Row) -> Row:
        measured = _once(folder / f"test {name}.json", lambda: _measured(place, ready, chosen))
        return {"model": name, **measured, **times}

    yield row("base", ready.base.folder, dict.fromkeys(_speed(ours), ""))
    if not (folder / "baked").exists():
        _bake(folder / "chosen.yaml", folder / "baked")
    yield row("bake", folder / "baked", _speed(ours))
    places = (folder / "heretic").glob("trial-*")
    for place in sorted(places, key=lambda one: int(one.name.removeprefix("trial-"))):
        yield row(f"heretic {place.name}", place, _speed(theirs))


def _once(path: Path, make: Callable[[], Row]) -> Row:
    """What is in the file, made when it is not there."""
    if not path.exists():
        found = make()
        path.write_text(json.dumps(found), encoding="utf-8")
    read: Row = json.loads(path.read_text(encoding="utf-8"))
    return read


def _speed(times: Mapping[str, Any]) -> Row:
    trials, seconds = times["trials"] - 1, times["last"] - times["first"]
    processor = times["last, processor"] - times["first, processor"]
    return {
        "trials a minute": f"{60 * trials / seconds:.1f}",
        "processor s a trial": f"{processor / trials:.2f}",
        "whole, s": f"{times['whole']:.0f}",
        "whole, processor s": f"{times['whole, processor']:.0f}",
    }


def _search(folder: Path, chosen: argparse.Namespace, tokens: Sequence[str]) -> Row:
    """`bake search` in a cache of its own, which has nothing of earlier ones but the demo."""
    demo, cache = materialise().model.parent, folder / "cache"
    cache.mkdir(exist_ok=True)
    link = cache / demo.relative_to(cache_folder())
    if not link.exists():
        link.symlink_to(demo)
    allowed = 100 / chosen.prompts + 0.5
    settings = [
        f"search.trials={chosen.trials}",
        f"search.startup={_startup(chosen)}",
        f"search.prompts={chosen.prompts}",
        f"guard.lookalike_rise={allowed}",
        f"guard.general_rise={allowed}",
        *tokens,
    ]
    command = [sys.executable, "-m", "bake", "search", "--recipe", RECIPE, "--overwrite"]
    command += [part for one in settings for part in ("--set", one)]
    command += ["--output", str(folder / "chosen.yaml")]
    return _watched(
        command, {"BAKE_CACHE": str(cache)}, None, cache / "search", '{"trial"', chosen.trials
    )


def _startup(chosen: argparse.Namespace) -> int:
    """A third at random, as of bake's 120 trials; of heretic's 200 it is 60."""
    return max(1, chosen.trials // 3)


def _bake(recipe: Path, output: Path) -> None:
    """The chosen recipe's checkpoint; what it does to answers is measured beside heretic's."""
    overrides = ("export.gguf=null", "evaluate.runtimes=[transformers]", "evaluate.limit=8")
    wide = "guard={protected_drop: 100, lookalike_rise: 100, general_rise: 100}"
    bake(load_recipe(str(recipe), overrides=(*overrides, wide), output=str(output)))


def _heretic(folder: Path, ready: Prepared, chosen: argparse.Namespace) -> Row:
    """Run heretic; what it saves of its front is no part of its times."""
    folder.mkdir(exist_ok=True)
    _configure(folder, ready, chosen)
    command = [chosen.python, "driver.py", str(folder), str(chosen.front)]
    root = str(Path(__file__).parent.parent)
    environment = {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    ended = '"datetime_complete":"'
    return _watched(
        command, environment, folder, folder / "checkpoints", ended, chosen.trials, "searched"
    )


def _configure(folder: Path, ready: Prepared, chosen: argparse.Namespace) -> None:
    """heretic's prompts and settings in its folder."""
    fit, select = ready.part("fit", ready.recipe.fit.prompts_per_class), ready.part("select")
    sets = {
        "bad_prompts": fit["target"],
        "good_prompts": fit["general"],
        "bad_evaluation_prompts": select["target"][: chosen.prompts],
        "good_evaluation_prompts": select["general"][: chosen.prompts],
    }
    lines = [
        f"model = {json.dumps(str(ready.base.folder))}",
        'dtypes = ["float32"]',
        f"batch_size = {BATCH}",
        f"max_response_length = {ready.recipe.evaluate.answer_tokens}",
        'response_prefix = ""',
        f"n_trials = {chosen.trials}",
        f"n_startup_trials = {_startup(chosen)}",
        f"seed = {ready.recipe.seed}",
        'export_strategy = "merge"',
        f"system_prompt = {json.dumps(SYSTEM)}",
    ]
    for name, prompts in sets.items():
        path = folder / f"{name}.txt"
        path.write_text("".join(f"{one.text}\n" for one in prompts), encoding="utf-8")
        lines += [f"[{name}]", f"dataset = {json.dumps(str(path))}"]
    (folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    model = LiveModel.load(ready.base.folder, ready.arch)
    text = sets["bad_prompts"][0].text
    turns = [("system", SYSTEM), ("user", text)]
    assert model.render_turns(turns) == model.render(text), "the template has another system turn"


def _watched(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None,
    journals: Path,
    mark: str,
    trials: int,
    ended: str = "",
) -> Row:
    """Run a search whose journal has a `mark` a finished trial; its times in seconds.

    `whole` is until the file `ended` is there, or until the process ends.
    """
    begun = time.perf_counter()
    found: Row = {"trials": trials}
    log = Path(journals.parent) / f"{journals.name}.log"
    with log.open("w") as stream:
        process = psutil.Popen(
            command, env=os.environ | environment, cwd=folder, stdout=stream, stderr=stream
        )

        def noted(name: str) -> None:
            times = process.cpu_times()
            found[name] = time.perf_counter() - begun
            found[f"{name}, processor"] = times.user + times.system

        while process.poll() is None:
            count = sum(path.read_text().count(mark) for path in journals.glob("*.jsonl"))
            if count and "first" not in found:
                noted("first")
            if count >= trials and "last" not in found:
                noted("last")
            if not (ended and folder and (folder / ended).exists()):
                noted("whole")
            time.sleep(TICK)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {log.read_text()[-2000:]}")
    return found


def _measured(folder: Path, ready: Prepared, chosen: argparse.Namespace) -> Row:
    """Refusals on the test split by role, with their counts and intervals, and the divergence."""
    recipe = ready.recipe
    model = LiveModel.load(folder, ready.arch, torch.float32)
    base = LiveModel.load(ready.base.folder, ready.arch, torch.float32)
    prompts = ready.part("test", chosen.test)
    answers = judged(
        prompts,
        model.render,
        lambda starts: model.answer(starts, recipe.evaluate.answer_tokens, BATCH),
        model.text,
        find_judge(recipe.judge),
        Thinking(recipe.judge.thinking.begin, recipe.judge.thinking.end),
    )
    found: Row = {}
    for role, rate in rates(answers).items():
        low, high = rate.interval
        found[role] = f"{rate} [{low:.0f}, {high:.0f}]"
    general = [base.render(one.text) for one in prompts["general"]]
    drift = of_models(base, model, (), general, ())
    return found | {"KL": f"{drift.first_token:.4f}"}


if __name__ == "__main__":
    main()
