"""The next point of a search: what Optuna's TPE makes of the trials that are finished."""

import json
import warnings
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from bake.errors import RecipeError
from bake.recipe import Recipe
from bake.recipe.search import Parameter
from bake.search.space import Point, spaces, value_of
from bake.search.trial import Trial, objectives

__all__ = ["drawn", "need_optuna"]

EXTRA = 'pip install -c constraints.txt -e ".[search]"'
DIGITS = 4  # Significant digits of a drawn number: nobody reads more, and none decides.
ALTERNATIVE = "alternative"


def need_optuna() -> Any:
    """The package, quiet. Raises RecipeError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise RecipeError(f"bake search needs the extra `search`: {EXTRA}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def drawn(recipe: Recipe, finished: Sequence[Trial], number: int) -> tuple[dict[str, Any], Point]:
    """What the sampler draws for a trial, and the point that it stands for.

    Multivariate TPE over two objectives, with constraints (Watanabe and Hutter 2023,
    arXiv:2211.14411, as in Optuna). Nothing but the finished trials, the recipe's seed and the
    number decides, so a search that was interrupted goes on as if it had not been.
    """
    optuna = need_optuna()
    assert recipe.search is not None
    every = spaces(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=_seed(recipe.seed, number),
            n_startup_trials=recipe.search.startup,
            multivariate=True,
            # Keys of one alternative are unknown to the others.
            group=len(every) > 1,
        )
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for one in finished:
            study.add_trial(_frozen(optuna, recipe, one))
        asked = study.ask()
        found: dict[str, Any] = {}
        chosen = 0
        if len(every) > 1:
            choices = list(range(len(every)))
            chosen = found[ALTERNATIVE] = asked.suggest_categorical(ALTERNATIVE, choices)
        point: dict[str, object] = {}
        for key, parameter in every[chosen].items():
            kinds = _distributions(optuna, recipe, chosen, key, parameter)
            values = {
                name: _rounded(_suggested(asked, name, kind), parameter)
                for name, kind in kinds.items()
            }
            found |= values
            point[key] = value_of(parameter, *values.values())
    return found, point


def _frozen(optuna: Any, recipe: Recipe, trial: Trial) -> Any:
    """A finished trial as Optuna knows it."""
    every = spaces(recipe)
    chosen = int(trial.drawn.get(ALTERNATIVE, 0))
    kinds: dict[str, Any] = {}
    if ALTERNATIVE in trial.drawn:
        choices = list(range(len(every)))
        kinds[ALTERNATIVE] = optuna.distributions.CategoricalDistribution(choices)
    for key, parameter in every[chosen].items():
        kinds |= _distributions(optuna, recipe, chosen, key, parameter)
    if trial.figures is None:
        state, values = optuna.trial.TrialState.FAIL, None
    else:
        state, values = optuna.trial.TrialState.COMPLETE, objectives(recipe.guard, trial.figures)
    return optuna.trial.create_trial(
        state=state,
        values=values,
        params=dict(trial.drawn),
        distributions=kinds,
        constraints=dict(trial.excess) or None,
    )


def _distributions(
    optuna: Any, recipe: Recipe, alternative: int, key: str, parameter: Parameter
) -> dict[str, Any]:
    """What the sampler draws for a key, by its own names: alternatives are strangers to it."""
    assert recipe.search is not None
    kinds = optuna.distributions
    name = key if key in recipe.search.space else f"{alternative}: {key}"
    if parameter.choices is not None:
        choices = [json.dumps(one) for one in parameter.choices]
        return {name: kinds.CategoricalDistribution(choices)}
    if parameter.first is not None and parameter.last is not None:
        return {
            f"{name}, first": kinds.IntDistribution(*parameter.first),
            f"{name}, last": kinds.IntDistribution(*parameter.last),
        }
    low: Any = parameter.low
    high: Any = parameter.high
    step, log = parameter.step, parameter.log
    if parameter.whole:
        return {name: kinds.IntDistribution(low, high, log=log, step=step or 1)}
    return {name: kinds.FloatDistribution(low, high, log=log, step=step)}


def _suggested(asked: Any, name: str, kind: Any) -> Any:
    """What the sampler gives for a distribution."""
    if hasattr(kind, "choices"):
        return asked.suggest_categorical(name, kind.choices)
    whole = isinstance(kind.low, int)
    suggest = asked.suggest_int if whole else asked.suggest_float
    return suggest(name, kind.low, kind.high, step=kind.step, log=kind.log)


def _rounded(value: Any, parameter: Parameter) -> Any:
    """A drawn number with few digits, within its bounds; one on a grid stays on it."""
    if not isinstance(value, float):
        return value
    if parameter.step is not None:
        return round(value, 10)
    low: Any = parameter.low
    high: Any = parameter.high
    return float(min(max(float(f"{value:.{DIGITS}g}"), low), high))


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(sha256(f"{seed} {number}".encode()).digest()[:4])
