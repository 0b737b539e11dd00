"""Every error that bake raises on purpose, and the exit code that each one means.

    BakeError                       (1)
    ├── InputError                  1   something the user gave cannot be used
    │   ├── RecipeError             1   the recipe: syntax, keys, values
    │   ├── PromptError             1   a prompt set
    │   ├── CheckpointError         1   a safetensors checkpoint or its config
    │   ├── GGUFError               1   a GGUF file
    │   ├── ConverterError          1   llama.cpp's converter: not to be had, or it does not convert
    │   ├── ArchitectureError       1   a model outside the table, a layer out of range
    │   ├── DirectionsError         1   a file of directions
    │   ├── ProbesError             1   a file of a gate's probes
    │   ├── JudgeError              1   a judge that does not answer, or not readably
    │   ├── ManifestError           1   a folder without the manifest of a bake
    │   ├── HubError                1   the Hub: a licence, a token, a repository, an upload
    │   ├── PlanError               1   a saved plan, or a base that is not the plan's any more
    │   └── OutputError             1   the output folder: exists, full, not writable
    ├── FitError                    1   the data do not determine a direction
    ├── LaunchError                 1   another process of a launch is gone
    ├── GuardError                  3   the bake changed what it promised to protect
    └── VerificationError           4   what was written is not what was planned

Code 0 is success, 2 a usage error (click), 130 an interrupt. Anything else that
escapes is a bug and shows its traceback.
"""

from typing import ClassVar

__all__ = [
    "ArchitectureError",
    "BakeError",
    "CheckpointError",
    "ConverterError",
    "DirectionsError",
    "FitError",
    "GGUFError",
    "GuardError",
    "HubError",
    "InputError",
    "JudgeError",
    "LaunchError",
    "ManifestError",
    "OutputError",
    "PlanError",
    "ProbesError",
    "PromptError",
    "RecipeError",
    "VerificationError",
]


class BakeError(Exception):
    """The root of the tree; its text is what the user reads on stderr."""

    exit_code: ClassVar[int] = 1


class InputError(BakeError):
    """Something the user gave cannot be used; the text names it and the remedy."""


class RecipeError(InputError):
    """The recipe is wrong; the text has one `file:line:column: path: message` a line."""


class PromptError(InputError):
    """A prompt set is missing, malformed or too small."""


class CheckpointError(InputError):
    """A safetensors checkpoint or one of its sidecar files cannot be read."""


class GGUFError(InputError):
    """A GGUF file cannot be read, or is not of the model that is being edited."""


class ConverterError(InputError):
    """llama.cpp's converter cannot be had, or it or its quantiser does not take the model."""


class ArchitectureError(InputError):
    """The model is outside the architecture table, or lacks what the recipe edits."""


class DirectionsError(InputError):
    """A file of directions cannot be read, or is not of the model that is being edited."""


class ProbesError(InputError):
    """A file of probes cannot be read, or is not of the gate that names it."""


class JudgeError(InputError):
    """A judge cannot be reached or loaded, or too many of its verdicts cannot be read."""


class ManifestError(InputError):
    """A folder has no manifest of a bake, or one that cannot be read."""


class HubError(InputError):
    """A bake may not be pushed, or the Hub cannot be reached or refuses."""


class PlanError(InputError):
    """A saved plan cannot be read, or what it was made of has changed since."""


class OutputError(InputError):
    """The output cannot be written: it exists, the disk is full, a path is not writable."""


class FitError(BakeError):
    """The data do not determine a direction: too few samples, one class, not finite."""


class LaunchError(BakeError):
    """Another process of this launch has ended, or is out of reach."""


class GuardError(BakeError):
    """The bake moved a protected behaviour beyond what the recipe allows."""

    exit_code: ClassVar[int] = 3


class VerificationError(BakeError):
    """What was read back from disk is not what the plan promised."""

    exit_code: ClassVar[int] = 4
