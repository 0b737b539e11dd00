"""The running of a fit: what it holds in memory, a run that is killed, several processes."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bake.fit.run
import bake.fit.stream
from bake.activations import Moments
from bake.archs import ARCHS
from bake.commands import main
from bake.directions import Directions, load_directions
from bake.errors import InputError, LaunchError
from bake.fitting import fit_to_file
from bake.journal import Journal
from bake.model import LiveModel
from bake.recipe import load_recipe
from bake.work import Work
from tests.chat_server import Answer, Script, reply
from tests.launched import launch
from tests.tiny import write_tiny

RECIPE = """\
model: model
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
edits: [{op: add, layer: 1, strength: -0.5}]
evaluate: {runtimes: [transformers]}
runtimes: [transformers]
fit: {bootstrap: 3, ridge: 0.1, prompts_per_class: 1000}
judge: {kind: chat, model: any, url: "http://nowhere/v1"}
"""
ROLES = ("target", "protected", "general")
# The tiny model is as wide; more than this of a class, and statistics are smaller.
WIDTH = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with sets of 146 prompts, 80 of them to fit on."""
    folder: Path = tmp_path_factory.mktemp("place")
    write_tiny("llama", folder / "model")
    write_sets(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def write_sets(folder: Path) -> None:
    """146 prompts a role, whose first word says which one it is."""
    for number, role in enumerate(ROLES):
        lines = [f"w{number} w{i % 73} w{(i * i + number) % 91} w{i // 73}" for i in range(146)]
        (folder / f"{role}.txt").write_text("\n".join(lines))


def by_first_word(number: int, body: dict[str, object]) -> Answer:
    """Target and protected prompts are refused, whatever the tiny model says."""
    refused = any(f"<question>\\n{word} " in json.dumps(body) for word in ("w0", "w1"))
    return reply("verdict: REFUSED" if refused else "verdict: ANSWERED")


@pytest.fixture
def judge(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """A judging server; the place is the current folder, with a cache of the test's own."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    script = Script(by_first_word)
    threading.Thread(target=script.serve_forever, args=(0.01,), daemon=True).start()
    yield script
    script.shutdown()
    script.server_close()


def fitted(judge: Script, output: Path, *overrides: str) -> Directions:
    found = load_recipe("recipe.yaml", overrides=[f"judge.url={judge.url}", *overrides])
    return fit_to_file(found, output)


# --- memory


def held(judge: Script, output: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """The numbers that all passes of a fit hold of the activations."""
    seen: list[Moments] = []
    collect = bake.fit.run.collect

    def counted(*arguments: object, **options: object) -> dict[object, Moments]:
        found = collect(*arguments, **options)  # type: ignore[arg-type]
        seen.extend(found.values())
        return found

    with monkeypatch.context() as patched:
        patched.setattr(bake.fit.run, "collect", counted)
        fitted(judge, output, *overrides)
    return sum(one.held for one in seen)


@pytest.mark.parametrize(
    "overrides",
    [
        ("fit.estimator=mean-difference",),
        ("fit.estimator=category",),
        ("fit.estimator=rmd",),
        ("fit.estimator=wrmd",),
        ("fit.estimator=lda",),
        ("fit.estimator=mean-difference", "fit.protect=null-space"),
        ("fit.estimator=rmd", "fit.protect=remove"),
        ("fit.estimator=rmd", "fit.protect=residual", "fit.concepts=[general]"),
    ],
    ids=lambda one: " ".join(text.removeprefix("fit.") for text in one),
)
def test_memory_does_not_grow_with_the_prompts(
    judge: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    monkeypatch.setattr(bake.fit.stream, "FIGURED", 10)
    fewer, more = (
        held(judge, tmp_path / f"{count}.safetensors", monkeypatch, *overrides,
             f"fit.prompts_per_class={count}")
        for count in (40, 80)
    )  # fmt: skip
    assert fewer == more > 0


@pytest.mark.parametrize("estimator", ["logistic", "safesteer", "pca"])
def test_what_needs_samples_has_them(
    judge: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    monkeypatch.setattr(bake.fit.stream, "FIGURED", 10)
    choice = f"fit.estimator={estimator}"
    fewer, more = (
        held(judge, tmp_path / f"{count}.safetensors", monkeypatch, choice,
             f"fit.prompts_per_class={count}")
        for count in (40, 80)
    )  # fmt: skip
    assert more - fewer == 2 * 40 * WIDTH


@pytest.mark.parametrize(
    "overrides",
    [
        ("fit.estimator=mean-difference",),
        ("fit.estimator=rmd",),
        ("fit.estimator=lda",),
        ("fit.estimator=rmd", "fit.protect=null-space"),
        ("fit.estimator=category", "fit.entries=9", "fit.protect=remove"),
    ],
    ids=lambda one: " ".join(text.removeprefix("fit.") for text in one),
)
def test_statistics_give_the_direction_of_the_samples(
    judge: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    samples, statistics = [], []
    for figured, found in ((1000, samples), (10, statistics)):
        monkeypatch.setattr(bake.fit.stream, "FIGURED", figured)
        done = fitted(judge, tmp_path / f"{figured}.safetensors", *overrides)
        found.append(done)
    (one,), (other,) = samples, statistics
    torch.testing.assert_close(one.vectors[1], other.vectors[1], rtol=1e-5, atol=1e-6)
    # The figures are of those whose samples stay.
    assert set(one.figures[1]) == set(other.figures[1])
    assert one.figures[1]["cosmic"] == pytest.approx(other.figures[1]["cosmic"], abs=1e-5)
    if overrides == ("fit.estimator=mean-difference",):
        assert one.figures[1]["spread"] != other.figures[1]["spread"]


# --- a run that is killed

KILLED = """\
import os, signal, sys
import bake.journal
from bake.commands import main
plain, left = bake.journal.save_file, [int(sys.argv.pop(1))]
def dying(tensors, path):
    if not left[0]:
        plain(tensors, path)
        content = open(path, "rb").read()
        open(path, "wb").write(content[:-7])
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    plain(tensors, path)
bake.journal.save_file = dying
main()
"""


def killed(judge: Script, output: Path, batches: int, *overrides: str) -> None:
    """`bake fit` in a process that is killed while it writes the result of a batch."""
    options = [f"judge.url={judge.url}", *overrides]
    arguments = ["fit", "--recipe", "recipe.yaml", "--output", str(output)]
    arguments += [word for one in options for word in ("--set", one)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(batches), *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    assert not output.exists()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What batches are run for, one entry a batch."""
    seen: list[str] = []
    plain = Journal.result

    def result(self: Journal, of: object, compute: object) -> object:
        def counted() -> object:
            seen.append(json.dumps(of))
            return compute()  # type: ignore[operator]

        return plain(self, of, counted)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "result", result)
    return seen


def test_a_killed_fit_goes_on_where_it_was(
    judge: Script,
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = fitted(judge, tmp_path / "whole.safetensors")
    every = list(computed)
    assert len(set(every)) == len(every) > 20
    assert not list((tmp_path / "cache" / "fit").iterdir())
    # Killed among the answers, and again among the measured batches.
    kinds = [json.loads(one)[0][0] for one in every]
    assert kinds.count("answers") == 6
    output = tmp_path / "killed.safetensors"
    killed(judge, output, 4)
    killed(judge, output, 5)
    computed.clear()
    again = fitted(judge, output)
    assert computed == every[9:]
    assert "fit: 9 batches are finished already, in " in capsys.readouterr().err
    assert torch.equal(again.vectors[1], whole.vectors[1])
    assert again.figures == whole.figures
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list((tmp_path / "cache" / "fit").iterdir())


def test_another_recipe_or_model_starts_anew(
    judge: Script, place: Path, tmp_path: Path, computed: list[str]
) -> None:
    killed(judge, tmp_path / "d.safetensors", 7)
    (run,) = (tmp_path / "cache" / "fit").iterdir()
    fitted(judge, tmp_path / "other.safetensors", "fit.ridge=0.2")
    other = list(computed)
    assert len(other) > 20
    # One weight of the model, in a file of the same size.
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    computed.clear()
    fitted(judge, tmp_path / "moved.safetensors")
    assert len(computed) == len(other)
    weights.write_bytes(before)
    assert list((tmp_path / "cache" / "fit").iterdir()) == [run]
    # What is damaged is measured again, and nothing else.
    files = sorted(run.glob("*.safetensors"))
    assert len(files) == 7
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    computed.clear()
    fitted(judge, tmp_path / "d.safetensors")
    assert len(computed) == len(other) - 5


def test_a_run_that_was_given_up_is_removed(judge: Script, tmp_path: Path) -> None:
    old, young = tmp_path / "cache" / "fit" / "old", tmp_path / "cache" / "fit" / "young"
    for folder, days in ((old, 31), (young, 29)):
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - days * 24 * 3600,) * 2)
    Journal.of("new")
    assert (old.exists(), young.exists()) == (False, True)


def test_sampled_answers_are_those_of_an_uninterrupted_run(
    judge: Script, tmp_path: Path, computed: list[str]
) -> None:
    sampled = ("fit.answers={samples: 2, tokens: 4}",)
    whole = fitted(judge, tmp_path / "whole.safetensors", *sampled)
    killed(judge, tmp_path / "d.safetensors", 3, *sampled)
    computed.clear()
    again = fitted(judge, tmp_path / "d.safetensors", *sampled)
    assert computed
    assert torch.equal(again.vectors[1], whole.vectors[1])


def test_hooked_answers_are_never_remembered(judge: Script, tmp_path: Path) -> None:
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    model = replace(model, work=Work(journal=Journal(tmp_path / "run")))
    prompts = [[1, 3, 40, 2], [1, 3, 41, 2]]
    bare = model.answer(prompts, 4, remember=True)
    assert Journal(tmp_path / "run").finished == 1
    handle = model.block(1).register_forward_hook(lambda _, __, out: out * 0)
    hooked = model.answer(prompts, 4)
    handle.remove()
    assert hooked != bare
    assert Journal(tmp_path / "run").finished == 1


# --- several processes


def launched(judge: Script, output: Path, *overrides: str, dies: str = "") -> tuple[int, str, str]:
    """`bake fit` in two processes."""
    options = [word for one in (f"judge.url={judge.url}", *overrides) for word in ("--set", one)]
    arguments = ("fit", "--recipe", "recipe.yaml", "--output", str(output), *options)
    return launch(2, *arguments, dies=dies)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["rmd", "logistic"])
def test_two_processes_equal_one(judge: Script, tmp_path: Path, estimator: str) -> None:
    overrides = (f"fit.estimator={estimator}", "fit.protect=null-space", "fit.bootstrap=0")
    one = fitted(judge, tmp_path / "one.safetensors", *overrides)
    asked = len(judge.asked)
    output = tmp_path / "two.safetensors"
    # Another cache: the judge shall be asked, and by one process alone.
    os.environ["BAKE_CACHE"] = str(tmp_path / "other")
    code, out, err = launched(judge, output, *overrides)
    assert code == 0, err
    assert out.count(f"written: {output}") == 1
    assert err.count("fit ...") == 1
    assert len(judge.asked) == 2 * asked
    two = load_directions(output)
    # Each of two has a thread, the one has several: elsewhere equal to the bit (test_launch.py).
    gap = (two.vectors[1] - one.vectors[1]).norm() / one.vectors[1].norm()
    assert float(gap) < 1e-6
    assert two.figures[1] == pytest.approx(one.figures[1], abs=1e-6)
    assert not list((tmp_path / "other" / "fit").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["raise", "exit", "kill"])
def test_a_process_that_fails_ends_all_of_them(judge: Script, tmp_path: Path, dies: str) -> None:
    started = time.monotonic()
    code, out, err = launched(judge, tmp_path / "d.safetensors", dies=dies)
    assert code != 0
    assert time.monotonic() - started < 120
    assert "written" not in out
    assert not (tmp_path / "d.safetensors").exists()
    # The launcher says whose end it was, and that one why, where it can.
    assert "local_rank: 1" in err
    assert ("bake: this process has bad luck" in err) == (dies == "raise")


def test_a_process_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> object:
        raise RuntimeError(said)

    said = "Connection closed by peer [127.0.0.1]:43210"
    monkeypatch.setattr("accelerate.utils.gather_object", gone)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", gone)
    work = Work(rank=1, size=2)
    for together in (work.wait, lambda: work.by_main(lambda: 1)):
        with pytest.raises(LaunchError, match="another process of this launch has ended; its own"):
            together()
    said = "Timed out waiting 60000ms for recv operation to complete"
    monkeypatch.setenv("BAKE_PATIENCE", "1")
    with pytest.raises(LaunchError, match="no word from another process of this launch for 0:01"):
        work.wait()


def test_patience_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKE_PATIENCE", "an hour")
    with pytest.raises(InputError, match="BAKE_PATIENCE: expected whole minutes, found 'an hour'"):
        Work.launched()


def test_not_everything_takes_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["bake", "recipes"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "several processes are for bakes" in capsys.readouterr().err
