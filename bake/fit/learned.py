"""The estimators that learn from a live model, by the names that `fit.estimator` takes.

What a direction does to the model is a loss here; `cone_basis` and `learned_mix` make it small.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bake.errors import FitError
from bake.fit.category import sparse
from bake.fit.cone import cone_basis
from bake.fit.low_rank_mix import learned_mix, mixing_basis
from bake.fit.samples import Samples, unit
from bake.fit.shifted import shifted
from bake.fit.span import independent
from bake.fit.spread import Draw, as_drawn
from bake.fit.tail import Tail
from bake.model import LiveModel, batches
from bake.recipe import Fit

__all__ = ["LEARNED", "ConeLoss", "Lesson", "MixLoss", "Said", "refusal_openings"]

Loss = Callable[[Tensor, int], Tensor]
Progress = Callable[[int], None]
BATCH = 16
# The weight of adding against ablating and staying, as in the code of arXiv:2502.17420.
INDUCE = 0.2


@dataclass(frozen=True)
class Said:
    """A prompt and an answer to it, as token ids, and the prompt's topic."""

    start: tuple[int, ...]
    answer: tuple[int, ...]
    topic: str = ""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What directions are learned from: a model of `depth` blocks, and what it says itself.

    `samples` by layer are the refused and the answered class's activations, and `kinds` the
    mean states [m, d] of all kinds of refusal that a mix is made of, that of the refused class
    first.
    """

    model: LiveModel
    depth: int
    refused: Sequence[Said]
    answered: Sequence[Said]
    samples: Mapping[int, tuple[Samples, Samples]]
    kinds: Mapping[int, Tensor]
    choice: Fit
    seed: int

    def again(self, refused: Draw, answered: Draw) -> "Lesson":
        """The lesson with each topic's prompts as often as it was drawn."""
        samples = {
            layer: (as_drawn(first, refused), as_drawn(second, answered))
            for layer, (first, second) in self.samples.items()
        }
        kinds = {
            layer: torch.cat([samples[layer][0].mean[None], means[1:]])
            for layer, means in self.kinds.items()
        }
        said = (_repeated(self.refused, refused), _repeated(self.answered, answered))
        return replace(self, refused=said[0], answered=said[1], samples=samples, kinds=kinds)


def _repeated(said: Sequence[Said], counts: Draw) -> list[Said]:
    return [one for one in said for _ in range(counts[one.topic])]


class ConeLoss:
    """What makes directions a cone of refusal, on a live model: a mean over prompts.

    CE of compliant answers to refused prompts with the direction taken out of the whole stream,
    0.2 times CE of refusals to answered prompts with it added behind `layer`, as long as the
    mean difference, and KL(clean ‖ without the direction) on the answered prompts' own answers.
    Both kinds of answers are what the model says under the mean difference `gap` [d]. Raises
    FitError where it then says nothing. Source: concept cones (arXiv:2502.17420), the losses
    and their weights.
    """

    def __init__(self, lesson: Lesson, layer: int, gap: Tensor) -> None:
        self._model, self._depth, self._layer = lesson.model, lesson.depth, layer
        self._length = gap.norm()
        tokens = lesson.choice.answers.tokens
        generator = torch.Generator().manual_seed(lesson.seed)
        refused, answered = (
            [prompts[place] for place in torch.randperm(len(prompts), generator=generator).tolist()]
            for prompts in (lesson.refused, lesson.answered)
        )
        with shifted(self._model, self._depth, remove=gap):
            self._complied = self._said(refused, tokens)
        with shifted(self._model, self._depth, add={layer: gap}):
            self._declined = self._said(answered, tokens)
        self._own = [one for one in answered if one.answer]
        if not (self._complied and self._declined and self._own):
            raise FitError(
                f"layer {layer}: with the mean difference taken out or added the model says "
                "nothing at all, so there is nothing to learn from; give another layer"
            )

    def __call__(self, directions: Tensor, step: int) -> Tensor:
        """The loss [] of unit directions [n, d], each of one prompt of every kind."""
        bypass = self._mean(directions, self._complied, step, self._unlikelihood, remove=True)
        induce = self._mean(directions, self._declined, step, self._unlikelihood, remove=False)
        kept = self._mean(directions, self._own, step, self._divergence, remove=True)
        return bypass + INDUCE * induce + kept

    def _said(self, prompts: Sequence[Said], tokens: int) -> list[Said]:
        answers = self._model.answer([one.start for one in prompts], tokens)
        found = zip(prompts, answers, strict=True)
        return [Said(one.start, tuple(answer)) for one, answer in found if answer]

    def _mean(
        self,
        directions: Tensor,
        prompts: Sequence[Said],
        step: int,
        measure: Callable[["_Answers", Tensor], Tensor],
        *,
        remove: bool,
    ) -> Tensor:
        """The mean of a measure [n, tokens] over the tokens of each answer, and over prompts."""
        count = len(directions)
        chosen = [prompts[(step * count + place) % len(prompts)] for place in range(count)]
        answers = _Answers(self._model, chosen)
        own = directions[list(answers.batch.rows), None]
        change = {"remove": own} if remove else {"add": {self._layer: self._length * own}}
        with shifted(self._model, self._depth, **change):
            after = answers.log_probabilities()
        found = measure(answers, after) * answers.mask
        return (found.sum(1) / answers.mask.sum(1)).mean()

    @staticmethod
    def _unlikelihood(answers: "_Answers", after: Tensor) -> Tensor:
        return -after.gather(2, answers.wanted[..., None])[..., 0]

    @staticmethod
    def _divergence(answers: "_Answers", after: Tensor) -> Tensor:
        with torch.no_grad():
            before = answers.log_probabilities()
        return (before.exp() * (before - after)).sum(-1)


class _Answers:
    """A batch of prompts with their answers; `wanted` [n, t] are tokens of the `mask` [n, t]."""

    def __init__(self, model: LiveModel, said: Sequence[Said]) -> None:
        self._model = model
        padding = model.tokenizer.pad_token_id
        (self.batch,) = batches([one.start + one.answer for one in said], padding, len(said))
        lengths = torch.tensor([len(said[row].answer) for row in self.batch.rows])
        longest = int(lengths.max())
        self.wanted = self.batch.ids[:, -longest:]
        self.mask = torch.arange(longest) >= longest - lengths[:, None]

    def log_probabilities(self) -> Tensor:
        """What the model expects [n, t, vocabulary] in the place of every wanted token."""
        logits = self._model.last_logits(self.batch, self.wanted.shape[1] + 1)
        return torch.log_softmax(logits[:, :-1], -1)


class MixLoss:
    """What makes a vector one of refusal, on a live model, at the last prompt token.

    -log P(refusal | refused prompt, +v) + KL(clean ‖ +v) on answered prompts, P the probability
    of all tokens in `openings`, as "From Refusal Tokens to Refusal Control" (arXiv:2603.13359)
    has it. There the model refused two thirds of these prompts; one that refuses them all has
    nothing to learn from that, so the same is asked of -v: -log (1 - P) and KL(clean ‖ -v).
    """

    def __init__(self, lesson: Lesson, layer: int, openings: Sequence[int]) -> None:
        padding = lesson.model.tokenizer.pad_token_id
        self._refused, self._answered = (
            [
                Tail(lesson.model, layer, batch)
                for batch in batches([one.start for one in said], padding, BATCH)
            ]
            for said in (lesson.refused, lesson.answered)
        )
        self._openings = torch.zeros(self._refused[0].clean.shape[1], dtype=torch.bool)
        self._openings[list(openings)] = True

    def __call__(self, vector: Tensor, step: int) -> Tensor:
        """The loss [] of a vector [d], on one batch of each class."""
        refused = self._refused[step % len(self._refused)]
        answered = self._answered[step % len(self._answered)]
        refuses = refused.shifted(vector)[:, self._openings].logsumexp(1)
        complies = refused.shifted(-vector)[:, ~self._openings].logsumexp(1)
        clean = answered.clean
        moved = [
            (clean.exp() * (clean - answered.shifted(one))).sum(1).mean()
            for one in (vector, -vector)
        ]
        return sum(moved, -refuses.mean() - complies.mean())


def refusal_openings(refused: Sequence[Said], answered: Sequence[Said]) -> list[int]:
    """The tokens that open a larger share of the refused answers than of the others."""
    counts = [Counter(one.answer[0] for one in said if one.answer) for said in (refused, answered)]
    shares = [{token: n / one.total() for token, n in one.items()} for one in counts]
    return sorted(token for token in shares[0] if shares[0][token] > shares[1].get(token, 0.0))


def _cone(lesson: Lesson, layer: int, progress: Progress) -> Tensor:
    """The basis [k, d], from the mean difference and random directions."""
    gap = _gap(lesson, layer)
    generator = torch.Generator().manual_seed(lesson.seed)
    others = torch.randn(lesson.choice.basis - 1, len(gap), generator=generator)
    loss = _counted(ConeLoss(lesson, layer, gap), progress)
    start = torch.cat([gap[None], others])
    return cone_basis(loss, start, lesson.choice.steps, BATCH, lesson.seed).double()


def _low_rank_mix(lesson: Lesson, layer: int, progress: Progress) -> Tensor:
    """The direction [d], mixed of the sparse differences of every kind and the answered class."""
    openings = refusal_openings(lesson.refused, lesson.answered)
    if not openings:
        raise FitError(
            "fit.estimator: low-rank-mix: refusals open with no token of their own, so there is "
            "no sign of one in the first token; take another estimator"
        )
    refused, answered = lesson.samples[layer]
    differences = lesson.kinds[layer] - answered.mean
    kinds = [unit(sparse(one, lesson.choice.entries), one) for one in differences]
    rows = torch.cat([refused.centred, answered.centred]) / 2**0.5
    basis = mixing_basis(independent(torch.stack(kinds)), rows, lesson.choice.ridge)
    loss = MixLoss(lesson, layer, openings)
    length = float(_gap(lesson, layer).norm())
    counted, steps = _counted(loss, progress), lesson.choice.steps
    learned = learned_mix(counted, basis.float(), length, steps, lesson.seed).double()
    return unit(learned, learned)


def _counted(loss: Loss, progress: Progress) -> Loss:
    """The loss, which says when a step is done."""

    def counted(directions: Tensor, step: int) -> Tensor:
        found = loss(directions, step)
        progress(1)
        return found

    return counted


def _gap(lesson: Lesson, layer: int) -> Tensor:
    refused, answered = lesson.samples[layer]
    return (refused.mean - answered.mean).float()


# By name: the directions of a lesson behind a layer; the last argument hears of every step done.
LEARNED: Mapping[str, Callable[[Lesson, int, Progress], Tensor]] = {
    "cone": _cone,
    "low-rank-mix": _low_rank_mix,
}
