"""A report as a page: the template with its values, the policy, and a limit to its size."""

import hashlib
import shlex
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from bake.card import JUDGES
from bake.directions.value import FIGURES
from bake.evaluate import Paired, Rate
from bake.evidence import MOVED, Answer, Evaluation, Manifest, Shown, named_figures
from bake.html.figures import drawn
from bake.html.figures.scores import series_of
from bake.html.figures.trades import kinds_of
from bake.html.svg import stylesheet

__all__ = ["page"]

# A page stays below 3 MiB: the answers have what the rest of it does not need.
ANSWER_BYTES = 2 << 20
MARKUP_BYTES = 640
CHANGES = ("opened", "closed", "refused", "answered", "unread")


@dataclass(frozen=True)
class _Row:
    """A set in a runtime."""

    role: str
    before: Rate
    after: Rate
    changed: Paired | None

    @property
    def p(self) -> str:
        """McNemar's p, short."""
        p = self.changed.p if self.changed else 1.0
        return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def page(shown: Shown) -> str:
    """The report as HTML; the same files give the same text."""
    bake, figures = shown.manifest, drawn(shown)
    recipe = shown.evidence.loaded.recipe
    answers = _kept(shown.answers)
    style, script = f"{_text('report.css')}\n{stylesheet()}", _text("report.js")
    return _template().render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        bake=bake,
        description=recipe.description,
        unbreakable=shown.evidence.unbreakable(),
        moved=MOVED,
        judge=JUDGES[recipe.judge.kind].format(recipe.judge.model),
        behaviour={runtime: list(_rows(bake, runtime)) for runtime in bake.after},
        paired=bool(bake.measured.paired),
        figures={
            kind: {name: Markup(figure.inline()) for name, figure in pictures.items()}
            for kind, pictures in figures.items()
        },
        geometry=shown.geometry,
        evaluation=shown.evaluation,
        eval_judge=_judge(shown.evaluation),
        thinking={None: "", True: ", thinking", False: ", not thinking"},
        curves=kinds_of(shown.geometry) if shown.geometry else {},
        series=series_of(shown),
        chosen=any(one.chosen for one in shown.scores),
        meanings={name: FIGURES[name] for name in named_figures(shown.scores)},
        figure_names=[
            name for name in FIGURES if any(name in one for one in bake.fit.figures.values())
        ],
        opened_roles=list(dict.fromkeys(chain.from_iterable(bake.fit.openings.values()))),
        answers=answers,
        left_out=len(shown.answers) - len(answers),
        runtimes=list(dict.fromkeys(one.runtime for one in answers)),
        sets=list(dict.fromkeys(one.set for one in answers)),
        changes=[name for name in CHANGES if any(_change(one) == name for one in answers)],
        change=_change,
        verdict=_verdict,
        sides=_sides,
        **_commands(bake),
    )


def _rows(bake: Manifest, runtime: str) -> Iterator[_Row]:
    for role, after in bake.after[runtime].items():
        yield _Row(role, bake.before[runtime][role], after, bake.changed(runtime, role))


def _kept(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that fit on a page, as many of every set and runtime; in their order."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row, one in enumerate(answers):
        groups.setdefault((one.runtime, one.set), []).append(row)
    kept, room = [], ANSWER_BYTES
    for row in chain.from_iterable(zip_longest(*groups.values())):
        if row is None:
            continue
        room -= MARKUP_BYTES + _size(answers[row])
        if room < 0:
            break
        kept.append(row)
    return [answers[row] for row in sorted(kept)]


def _size(one: Answer) -> int:
    """The bytes of an answer on the page, its texts escaped."""
    words = (one.prompt, one.topic, one.before or "", one.after or "")
    return sum(len(str(Markup.escape(text)).encode("utf-8", "replace")) for text in words)


def _change(one: Answer) -> str:
    """What became of a verdict, one of CHANGES."""
    match one.refused_before, one.refused_after:
        case (True, False):
            return "opened"
        case (False, True):
            return "closed"
        case (True, True):
            return "refused"
        case (False, False):
            return "answered"
    return "unread"


def _verdict(refused: bool | None) -> str:
    return "unread" if refused is None else "refused" if refused else "answered"


def _sides(one: Answer) -> tuple[tuple[str, bool | None, str, str | None], ...]:
    """Both answers: when, whether refused, the kind of refusal, what was said if that is shown."""
    return (
        ("before", one.refused_before, one.category_before, one.before),
        ("after", one.refused_after, one.category_after, one.after),
    )


def _judge(found: Evaluation | None) -> str:
    """Who judged an evaluation."""
    return JUDGES[found.judge.kind].format(found.judge.model) if found else ""


def _commands(bake: Manifest) -> dict[str, str]:
    """What the recipe's file was called, what stands beside bake, and the command that bakes."""
    file = PurePath(bake.recipe.source).name
    versions = bake.versions.model_dump()
    # As in "auto (cuda)".
    device = str(versions.pop("device", "")).partition(" ")[0]
    words = ["env", f"BAKE_DEVICE={device}"] if device else []
    words += ["bake", "--recipe", file]
    for override in bake.recipe.overrides:
        name, _, value = override.partition(" ")
        words += [name, value]
    # The build of torch for one kind of processor is no name that an index has.
    pins = (
        f"{name}=={version.partition('+')[0]}"
        for name, version in versions.items()
        if name != "bake"
    )
    return {"file": file, "command": shlex.join(words), "install": " ".join(pins)}


def _policy(style: str, script: str) -> str:
    """What the page may do: its own style and its own script, by their hashes, and nothing else."""
    hashes = {
        name: f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for name, text in (("style-src", style), ("script-src", script))
    }
    allowed = "; ".join(f"{name} {digest}" for name, digest in hashes.items())
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


@cache
def _template() -> Template:
    return Environment(
        loader=PackageLoader("bake.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.jinja")


def _text(name: str) -> str:
    return files("bake.html").joinpath(name).read_text(encoding="utf-8").rstrip()
