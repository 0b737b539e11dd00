"""A recipe: what to steer, in which model, how, and what may not change.

A recipe is a YAML file. It is read into frozen values, a section a module; unknown keys are
errors, and all errors are reported at once as `file:line:column: path: message`.
"""

from bake.recipe.checks import Evaluation, Guard, Verification
from bake.recipe.edits import Ablate, Add, Gate, Kernel
from bake.recipe.export import Conversion, Export, GGUFExport
from bake.recipe.fit import Answers, Fit
from bake.recipe.judge import JudgeChoice
from bake.recipe.loading import (
    LoadedRecipe,
    ShippedRecipe,
    load_recipe,
    restore_recipe,
    shipped_recipes,
)
from bake.recipe.positions import Decision, OwnDecision, Positions
from bake.recipe.prompts import PromptRoles, PromptSet, PromptSource
from bake.recipe.schema import Recipe
from bake.recipe.search import Search

__all__ = [
    "Ablate",
    "Add",
    "Answers",
    "Conversion",
    "Decision",
    "Evaluation",
    "Export",
    "Fit",
    "GGUFExport",
    "Gate",
    "Guard",
    "JudgeChoice",
    "Kernel",
    "LoadedRecipe",
    "OwnDecision",
    "Positions",
    "PromptRoles",
    "PromptSet",
    "PromptSource",
    "Recipe",
    "Search",
    "ShippedRecipe",
    "Verification",
    "load_recipe",
    "restore_recipe",
    "shipped_recipes",
]
