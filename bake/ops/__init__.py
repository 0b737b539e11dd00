"""The operators, one a file: what a hook does, and the edits that do the same.

An operator of a recipe's `op: name` is a value of type `Operator` in OPERATORS.
"""

from collections.abc import Mapping
from typing import Any

from bake.ops.ablate import AblateOperator
from bake.ops.add import AddOperator
from bake.ops.gate import GateOperator
from bake.ops.operator import Measured, Operator

__all__ = ["OPERATORS", "Measured", "Operator"]

OPERATORS: Mapping[str, Operator[Any]] = {
    "add": AddOperator(),
    "ablate": AblateOperator(),
    "gate": GateOperator(),
}
