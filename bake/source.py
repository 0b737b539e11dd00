"""Where a recipe's model comes from: the demo, a local folder, or the Hub."""

from dataclasses import dataclass
from pathlib import Path

from bake.errors import CheckpointError, GGUFError
from bake.recipe import Recipe

__all__ = ["BaseModel", "Source", "base_model", "find_folder", "find_source"]

# What a bake reads of a Hub repository: no other framework's copy of the weights.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Source:
    """The base checkpoint's folder, and the base GGUF where the recipe has one."""

    folder: Path
    gguf: Path | None


@dataclass(frozen=True)
class BaseModel:
    """What a recipe's model is called; `hub_id` is empty for a local folder."""

    name: str
    organization: str = ""
    hub_id: str = ""
    revision: str = ""


def base_model(recipe: Recipe) -> BaseModel:
    """The model that a recipe edits, as model cards and GGUF metadata name it.

    The demo is SmolLM2-135M-Instruct with a LoRA merged in, and has no name of its own.
    """
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct" if recipe.model == "demo" else recipe.model
    if recipe.model != "demo" and _is_folder(Path(recipe.model)):
        return BaseModel(Path(recipe.model).resolve().name)
    organization, _, name = hub_id.rpartition("/")
    return BaseModel(name, organization, hub_id, recipe.revision or "")


def find_source(recipe: Recipe) -> Source:
    """Find or fetch the recipe's model.

    A folder that exists wins over a Hub id of the same spelling. Raises
    CheckpointError when there is neither, GGUFError when the base GGUF is missing.
    """
    from bake.demo import materialise

    folder = find_folder(recipe.model, recipe.revision, recipe.trust_remote_code)
    base = recipe.export.gguf.base if recipe.export.gguf else None
    if base is None:
        return Source(folder, None)
    if base == "demo":
        if recipe.model != "demo":
            raise GGUFError(
                "export.gguf.base: demo is the demo's GGUF, but the model is "
                f"{recipe.model!r}; give a GGUF of that model with "
                "--set export.gguf.base=FILE, or --set export.gguf=null "
                "--set evaluate.runtimes=[transformers]"
            )
        return Source(folder, materialise().gguf)
    gguf = Path(base)
    if not gguf.is_file():
        raise GGUFError(f"{gguf}: no such file; export.gguf.base takes a GGUF of the same model")
    return Source(folder, gguf)


def find_folder(model: str, revision: str | None = None, trusted: bool = False) -> Path:
    """A checkpoint's folder: the demo's, one on disk, or what the Hub has at a revision.

    Where it is `trusted`, the code that comes with it is fetched too.
    Raises CheckpointError where there is none of these.
    """
    from bake.demo import materialise

    if model == "demo":
        return materialise().model
    path = Path(model)
    if _is_folder(path):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*PATTERNS, "*.py"] if trusted else PATTERNS
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"model: {model}: no such folder, and the Hub gave none ({reason}); "
            "give a local folder or a Hub id, and log in for a gated one"
        ) from error


def _is_folder(path: Path) -> bool:
    """Whether it is one: a name too long for the system is none."""
    try:
        return path.is_dir()
    except OSError:
        return False
