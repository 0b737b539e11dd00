"""The constant of a ridge carrier: a readout of a writer's input that is 1 on every token.

In front of a post-norm it is to read the root mean square ρ of what the norm divides by it.
That is the constant 1 off a / ρ, so that an error counts by its share on every token.

A readout of prose and chats alone drifts on code and on other languages, so text that the model
draws itself, from any token on, stands beside them (docs/carriers.md has the figures).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bake.activations import Conversation, Moments, Tap, collect
from bake.errors import FitError
from bake.fit.readout import ReadoutClass, ridge_readout
from bake.hooks import Intervention, steered
from bake.model import LiveModel
from bake.ops.add import Add
from bake.recipe import Add as Spec

__all__ = ["Constant", "constant_error", "constant_readout", "own_text", "with_constants"]

_DEFAULTS = Spec(op="add", layer=0, strength=0)
OWN_TEXTS, OWN_TOKENS = 96, 80


@dataclass(frozen=True)
class Constant:
    """How far from 1 the constant is (root mean square), where it was fitted and held out."""

    fitted: float
    held_out: float


def constant_error(readout: Tensor, moments: Moments) -> float:
    """sqrt E (cᵀa - 1)², from the moments of a."""
    square = readout @ moments.gram @ readout - 2 * readout @ moments.mean + 1
    return float(square.clamp_min(0).sqrt())


def constant_readout(classes: Sequence[Moments], ridge: float) -> Tensor:
    """c [d] = argmin Σ_k E_k (cᵀa - 1)² + λ |c|² over classes k of inputs (`ridge_readout`)."""
    return ridge_readout([ReadoutClass(one.mean, one.gram, 1.0) for one in classes], ridge)


def own_text(model: LiveModel) -> list[Conversation]:
    """Text that the model draws behind one random token each: of all kinds that it knows."""
    special = set(model.tokenizer.all_special_ids)
    words = torch.tensor([one for one in range(len(model.tokenizer)) if one not in special])
    places = torch.randint(len(words), (OWN_TEXTS, 1), generator=torch.Generator().manual_seed(0))
    drawn = model.sample(words[places], OWN_TOKENS)
    return [Conversation(tuple(ids), len(ids) - 1, tuple(range(len(ids)))) for ids in drawn]


def with_constants(
    model: LiveModel,
    built: Sequence[tuple[object, Intervention]],
    classes: Sequence[Sequence[Conversation]],
    held_out: Sequence[Conversation],
) -> tuple[tuple[Intervention, ...], Mapping[str, Constant]]:
    """Give every ridge carrier its readout, `constant_readout` of the conversations by class.

    `built` are the interventions with the recipe's edits that they come from; a constant of
    `ablate` is fitted by the defaults of `add`. The inputs a
    are gathered with all of them in force, at every position, the first tokens included.
    Raises FitError when a constant is further from 1 on held-out text than its edit allows.
    """
    taps = {
        one.carried.tensor: Tap(
            model.module(one.carried.tensor.removesuffix(".weight")),
            *("input", "decision", "second"),
            model.module(one.carried.norm.module) if one.carried.norm else None,
        )
        for _, one in built
        if isinstance(one, Add) and one.carried.carrier == "ridge"
    }
    if not taps:
        return tuple(one for _, one in built), {}
    with steered(model, [one for _, one in built]):
        fitted = [
            collect(model, [_everywhere(one) for one in found], taps) for found in classes if found
        ]
        tested = collect(model, [_everywhere(one) for one in held_out], taps)
    ready: list[Intervention] = []
    errors: dict[str, Constant] = {}
    for spec, one in built:
        if isinstance(one, Add) and one.carried.tensor in taps:
            options, remedy = _DEFAULTS, "begin at another layer"
            if isinstance(spec, Spec):
                options, remedy = spec, "take another layer or site: mid"
            name = one.carried.tensor
            seen = [found[name] for found in fitted]
            readout = constant_readout(seen, options.ridge)
            squares = [constant_error(readout, one) ** 2 for one in seen]
            errors[name] = Constant(
                (sum(squares) / len(squares)) ** 0.5, constant_error(readout, tested[name])
            )
            if not errors[name].held_out <= options.constant_error:
                raise FitError(
                    f"{name}: the ridge carrier's constant is {errors[name].held_out:.1%} from 1 "
                    f"on held-out text, constant_error allows {options.constant_error:.1%}; "
                    f"{remedy}"
                )
            one = replace(one, readout=readout.float())
        ready.append(one)
    return tuple(ready), errors


def _everywhere(one: Conversation) -> Conversation:
    return replace(one, decision=tuple(range(len(one.ids))))
