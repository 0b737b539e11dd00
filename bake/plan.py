"""The plan: every edit, created tensor and config change, from headers alone.

A plan refuses what cannot be baked before any weight is touched; its numbers
come from the fit.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from bake.arch import Arch, Block
from bake.carriers.writers import writers_at
from bake.checkpoint import EDITABLE, Checkpoint
from bake.directions import Directions
from bake.directions.value import in_words
from bake.edits import CreatedTensor, PlannedEdit, Step
from bake.errors import ArchitectureError, CheckpointError, DirectionsError, GGUFError
from bake.gguf_file import GGUFFile
from bake.insertion import Insertion, inserted_config
from bake.ops import OPERATORS
from bake.quantised import left_unquantised
from bake.recipe import Recipe

__all__ = ["Plan", "check_gguf", "direction_layers", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a bake will do; there is one step for each entry of the recipe's `edits`.

    `directions` says where they come from, where the fit does not estimate them. Names in it
    are those before `insertion` has its blocks; `renamed` has the names that are then written,
    where they are others, and `inserted_config` what changes in config.json with them;
    `unquantised` is what changes there where edits take tensors out of FP8.
    """

    architecture: str
    layers: int
    width: int
    steps: tuple[Step, ...]
    insertion: Insertion
    directions: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    inserted_config: Mapping[str, object] = field(default_factory=dict)
    unquantised: Mapping[str, object] = field(default_factory=dict)

    @property
    def edits(self) -> tuple[PlannedEdit, ...]:
        """Every edit, in order."""
        return tuple(edit for step in self.steps for edit in step.edits)

    @property
    def created(self) -> tuple[CreatedTensor, ...]:
        """Every new tensor once, in order; a bias in every layer is one in inserted blocks too."""
        found = dict.fromkeys(tensor for step in self.steps for tensor in step.created)
        siblings = (
            replace(tensor, name=name)
            for tensor in found
            for name in self.insertion.copies(tensor.name)
        )
        return (*found, *siblings)

    @property
    def config(self) -> Mapping[str, object]:
        """What changes in config.json, by path."""
        changes = {key: value for step in self.steps for key, value in step.config.items()}
        return changes | dict(self.inserted_config) | dict(self.unquantised)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan chose, and why."""
        given = [self.directions] if self.directions else []
        if self.unquantised:
            given.append("what is edited or inserted is written in BF16; the rest stays in FP8")
        return (*given, *(note for step in self.steps for note in step.notes))

    def as_json(self) -> dict[str, object]:
        """The plan as plain values."""
        return {
            "architecture": self.architecture,
            "layers": self.layers,
            "width": self.width,
            "edits": [asdict(edit) | {"tensor": self.name(edit.tensor)} for edit in self.edits],
            "created": [
                asdict(tensor)
                | {"name": self.name(tensor.name), "beside": self.name(tensor.beside)}
                for tensor in self.created
            ],
            "inserted": [self._places(layer)[1] for layer in self.insertion.after],
            "renamed": self._moved,
            "config": dict(self.config),
            "notes": list(self.notes),
        }

    def name(self, tensor: str) -> str:
        """The name that a tensor is written under."""
        return self.renamed.get(tensor, tensor)

    @property
    def _moved(self) -> dict[str, str]:
        """The tensors of the base that get another name, with that name."""
        new = {tensor.name for tensor in self.created}
        return {old: name for old, name in self.renamed.items() if old not in new}

    def _places(self, layer: int) -> tuple[int, int]:
        """What a block of the base, and the one inserted behind it, are numbered in the end."""
        return self.insertion.number(layer), self.insertion.number(self.insertion.behind(layer))

    def table(self) -> str:
        """The plan as aligned plain text, with the names that are written."""
        rows = [("operator", "carrier", "tensor", "shape", "dtype")]
        for edit in self.edits:
            shape = " x ".join(map(str, edit.shape))
            rows.append((edit.operator, edit.carrier, self.name(edit.tensor), shape, edit.dtype))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        names = [one.name for one in self.created]
        biases = sum(self.insertion.original(name) is None for name in names)
        if biases:
            lines.append(f"created: {biases} tensors of zeros beside the edited biases")
        for layer in self.insertion.after:
            before, number = self._places(layer)
            start = f"{self.insertion.layer.format(layer=self.insertion.behind(layer))}."
            lines.append(
                f"inserted: block {number} behind block {before}, "
                f"{sum(name.startswith(start) for name in names)} tensors"
            )
        if self._moved:
            lines.append(f"renamed: {len(self._moved)} tensors of the blocks behind")
        lines += [f"config.json: {key} = {_brief(value)}" for key, value in self.config.items()]
        lines += self.notes
        return "\n".join(lines)


def _brief(value: object) -> str:
    return f"{len(value)} names" if isinstance(value, list) else str(value)


def make_plan(
    recipe: Recipe, base: Checkpoint, arch: Arch, directions: Directions | None = None
) -> Plan:
    """Plan a recipe for a checkpoint, reading nothing but headers.

    `directions` are those of the recipe's file. Raises ArchitectureError for tensors
    outside the table, layers out of range, carriers that the architecture lacks and edits
    in an order that has no hooks, CheckpointError for types that cannot be edited,
    DirectionsError for directions of another model or without what the edits need.
    """
    arch.check_tensors(base.tensors, base.config)
    steps = tuple(
        OPERATORS[spec.op].plan(spec, base, arch, f"edits.{number}", recipe.runtimes)
        for number, spec in enumerate(recipe.edits)
    )
    _check_order(steps, base, arch)
    _check_gating_blocks(steps)
    layers, width = arch.layer_count(base.config), arch.width(base.config)
    if directions is None:
        _check_place(recipe, base, arch)
    given = _given(recipe, directions, layers, width) if directions else ""
    after = tuple(sorted({layer for step in steps for layer in step.inserted}))
    plan = Plan(arch.model_type, layers, width, steps, Insertion(arch.layer, layers, after), given)
    if after:
        plan = _with_blocks(plan, recipe, base, arch)
    if base.beside:
        plan = replace(plan, unquantised=_unquantised(plan, base))
    for edit in plan.edits:
        if edit.dtype not in EDITABLE:
            raise CheckpointError(
                f"{base.folder}: {edit.tensor} is {edit.dtype}; give an unquantised checkpoint"
            )
    return plan


def _check_place(recipe: Recipe, base: Checkpoint, arch: Arch) -> None:
    """Refuse a place at which this model has no stream to measure directions of."""
    if recipe.fit.layer is not None:
        arch.check_layers((recipe.fit.layer,), base.config, "fit.layer")
    if recipe.fit.site == "mid":
        try:
            writers_at(base, arch, 0, "mid")
        except ArchitectureError as error:
            raise ArchitectureError(f"fit.site: {error}") from error


def _with_blocks(plan: Plan, recipe: Recipe, base: Checkpoint, arch: Arch) -> Plan:
    """The plan with the names and the config.json that its inserted blocks need."""
    assert isinstance(arch.block, Block)
    after = plan.insertion.after
    refusals = arch.block.refusals(plan.layers, plan.layers + len(after))
    for runtime in recipe.runtimes:
        if runtime in refusals:
            raise ArchitectureError(
                f"edits: {len(after)} inserted blocks: {runtime} {refusals[runtime]}; "
                "insert another number of blocks, or change runtimes"
            )
    scales = [one.name for beside in base.beside.values() for one in beside]
    names = [*base.tensors, *scales, *(tensor.name for tensor in plan.created)]
    return replace(
        plan,
        renamed=plan.insertion.renamed(names),
        inserted_config=inserted_config(arch, arch.block, base.config, after),
    )


def _unquantised(plan: Plan, base: Checkpoint) -> dict[str, object]:
    """What changes in config.json where matrices are written in BF16 beside others in FP8."""
    insertion = plan.insertion
    edited = dict.fromkeys(edit.tensor for edit in plan.edits if edit.tensor in base.beside)
    inserted = [
        tensor.name
        for tensor in plan.created
        if insertion.original(tensor.name) and len(tensor.shape) == 2
    ]
    plain = [name for name, one in base.tensors.items() if not one.scale and len(one.shape) == 2]
    return left_unquantised(
        base.config,
        [plan.name(name) for name in (*edited, *inserted)],
        [plan.name(name) for name in plain],
        lambda module: _moved_module(module, insertion, base),
    )


def _moved_module(module: str, insertion: Insertion, base: Checkpoint) -> str:
    """What a module that config.json names is called once blocks are inserted."""
    name = f"{module}."
    there = any(tensor.startswith(name) for tensor in base.tensors)
    if not insertion.after or not re.search(r"\d", module):
        return module
    if there:
        return insertion.renamed([name]).get(name, name)[:-1]
    raise ArchitectureError(
        f"config.json: quantization_config names {module}, which is no module of the checkpoint, "
        "so bake cannot say what it is called once a block is inserted; use carrier: ridge"
    )


def _check_order(steps: Iterable[Step], base: Checkpoint, arch: Arch) -> None:
    """Refuse edits of one tensor in an order that hooks do not have.

    Hooks act from the inside out: gates at a writer, ablations at the sum of a branch's
    writers or at an embedding, `add` at `mid` there too or behind a post-norm, `add` at `in`
    and `out` around the block. Norm-preserving ablations act at a writer too, and read the
    base's weights.
    """
    edited: dict[str, int] = {}
    behind: dict[tuple[str, str], int] = {}
    normed = {
        one.weight
        for written in arch.written(base.tensors).values()
        for one in written
        if one.branch.norm
    }
    for number, step in enumerate(steps):
        for edit in step.edits:
            if step.reads_base and edit.tensor in edited:
                raise ArchitectureError(
                    f"edits.{number}: {edit.tensor} is edited by edits.{edited[edit.tensor]} "
                    "already, and this edit reads the base's weights; name it first"
                )
            other = behind.get((edit.tensor, edit.operator))
            if other is not None:
                raise ArchitectureError(
                    f"edits.{number}: {edit.tensor}: edits.{other} acts behind this edit; "
                    f"name the {edit.operator} first"
                )
        edited |= {edit.tensor: number for edit in step.edits}
        behind |= dict.fromkeys(_inner(step, normed), number)


def _check_gating_blocks(steps: Sequence[Step]) -> None:
    """Refuse what shares a block with a gate, and what is added where its block is, but behind it.

    The block of a gate reads the stream behind its layer with all that was added there before.
    """
    gates: dict[int, int] = {}
    for number, step in enumerate(steps):
        if any(edit.operator == "gate" for edit in step.edits):
            gates = dict.fromkeys(step.inserted, number) | gates
    for number, step in enumerate(steps):
        for layer in step.inserted:
            if gates.get(layer, number) != number:
                raise ArchitectureError(
                    f"edits.{number}: a block is inserted behind layer {layer} for edits."
                    f"{gates[layer]} already, a gate, which shares none; take another layer"
                )
        for edit in step.edits:
            if edit.operator != "add" or edit.layer is None:
                continue
            gate = gates.get(edit.layer - (edit.site == "in"))
            if edit.site == "in" and gate is not None:
                raise ArchitectureError(
                    f"edits.{number}.site: what is added before block {edit.layer} lies in the "
                    f"block in front of it, which edits.{gate} reads; use site: out of layer "
                    f"{edit.layer - 1}, and name it first"
                )
            if edit.site == "out" and gate is not None and gate < number:
                raise ArchitectureError(
                    f"edits.{number}: edits.{gate} acts behind this edit; name the add first"
                )


def _inner(step: Step, normed: Collection[str]) -> Iterator[tuple[str, str]]:
    """The tensors and operators whose hooks act inside this step's, and so must come before it.

    An ablation does not cut a bias that the base does not have, so one that an `add` creates
    at `mid` must come behind it too.
    """
    created = {tensor.name: tensor.beside for tensor in step.created}
    for edit in step.edits:
        if edit.operator == "ablate" and not step.reads_base:
            yield edit.tensor, "gate"
        elif edit.operator == "add" and (edit.site != "mid" or edit.tensor in normed):
            yield edit.tensor, "ablate"
        elif edit.operator == "add" and edit.tensor in created:
            yield created[edit.tensor], "ablate"


def direction_layers(recipe: Recipe) -> tuple[int, ...]:
    """The layers whose direction the edits need, ascending."""
    return tuple(
        sorted({layer for spec in recipe.edits for layer in OPERATORS[spec.op].layers(spec)})
    )


def _given(recipe: Recipe, directions: Directions, layers: int, width: int) -> str:
    """Refuse directions that do not fit the model or the edits; say which ones will be used."""
    if directions.width != width:
        raise DirectionsError(
            f"{recipe.directions}: its vectors have width {directions.width}, the model's stream "
            f"has {width}; give directions of this model"
        )
    if directions.layers[-1] >= layers:
        raise DirectionsError(
            f"{recipe.directions}: it has a direction for layer {directions.layers[-1]}, the "
            f"model's layers are 0 to {layers - 1}; give directions of this model (row 0 of an "
            "array is behind block 0, not the embedding)"
        )
    needed = direction_layers(recipe)
    missing = [layer for layer in needed if layer not in directions.vectors]
    if missing:
        raise DirectionsError(
            f"{recipe.directions}: has no direction for layer {in_words(missing)}, which the edits "
            f"need; it has {in_words(directions.layers)}, so change edits or the file"
        )
    for number, spec in enumerate(recipe.edits):
        for layer in OPERATORS[spec.op].layers(spec):
            if layer in directions.several and not spec.several:
                raise DirectionsError(
                    f"{recipe.directions}: layer {layer} has {len(directions.basis(layer))} "
                    f"directions and edits.{number} (op: {spec.op}) takes one; use op: ablate, or "
                    f"take the first with `bake directions {recipe.directions} --first`"
                )
        variants = set(spec.variant) if spec.op == "ablate" else set()
        for variant in sorted(variants & {"projected", "affine"}):
            raise DirectionsError(
                f"{recipe.directions}: has no mean of the answered class, which edits.{number}."
                f"variant: {variant} needs; use variant: plain, or leave out directions"
            )
    origin = directions.origin
    about = [f"{name} {text}" for name, text in origin.as_json().items() if text]
    return (
        f"directions: layer {in_words(needed)} of {recipe.directions} ({', '.join(about)}); "
        "the recipe's fit estimates none"
    )


# How many of a GGUF's blocks, the last ones, predict further tokens (llama.cpp's --no-mtp).
PREDICTING = "nextn_predict_layers"


def check_gguf(plan: Plan, base: Checkpoint, arch: Arch, gguf: GGUFFile) -> None:
    """Refuse a base GGUF that is not of the checkpoint's model, from headers alone.

    Raises GGUFError for another architecture, missing tensors or other shapes.
    """
    if gguf.architecture != arch.gguf_architecture:
        raise GGUFError(
            f"{gguf.path}: its architecture is {gguf.architecture!r}, "
            f"but the checkpoint's is {arch.gguf_architecture!r}; give a GGUF of the same model"
        )
    blocks = gguf.metadata.get(f"{gguf.architecture}.block_count")
    ahead = gguf.metadata.get(f"{gguf.architecture}.{PREDICTING}", 0)
    if blocks != plan.layers and not (isinstance(ahead, int) and blocks == plan.layers + ahead):
        raise GGUFError(
            f"{gguf.path}: it has {blocks} blocks, the checkpoint {plan.layers}; "
            "give a GGUF of the same model"
        )
    _check_gguf_blocks(plan, arch, gguf)
    created = {tensor.name for tensor in plan.created}
    for edit in plan.edits:
        # What an inserted block has, the block before it has too.
        tensor = plan.insertion.original(edit.tensor) or edit.tensor
        name, shape = arch.gguf_name(tensor), edit.shape
        if tensor in created:
            # The bias is new in the file; the weight beside it must be the model's.
            name = name.removesuffix("bias") + "weight"
            shape = base.find(edit.tensor.removesuffix("bias") + "weight").shape
        if name not in gguf.tensors:
            raise GGUFError(f"{gguf.path}: no tensor named {name}; give a GGUF of the same model")
        if arch.is_transposed(edit.tensor):
            shape = (*shape[:-2], shape[-1], shape[-2])
        # Experts are stacked, so there may be an axis in front.
        if gguf.tensors[name].shape[-len(shape) :] != shape:
            raise GGUFError(
                f"{gguf.path}: {name} has shape {gguf.tensors[name].shape}, the checkpoint's "
                f"tensor {shape}; give a GGUF of the same model"
            )


def _check_gguf_blocks(plan: Plan, arch: Arch, gguf: GGUFFile) -> None:
    """Refuse a GGUF in which an inserted block would be another one than in the checkpoint."""
    insertion = plan.insertion.of_gguf()
    if not insertion.after:
        return
    if gguf.metadata[f"{gguf.architecture}.block_count"] != plan.layers:
        raise GGUFError(
            f"{gguf.path}: a block is to be inserted, and the file's last blocks are for "
            "multi-token prediction; convert it with --no-mtp, or use carrier: ridge"
        )
    assert isinstance(arch.block, Block)
    refusals = arch.block.refusals(plan.layers, plan.layers + len(insertion.after))
    if "llama.cpp" in refusals:
        raise GGUFError(
            f"{gguf.path}: a block is to be inserted, and llama.cpp {refusals['llama.cpp']}; use "
            "carrier: ridge, or set export.gguf=null and evaluate.runtimes=[transformers]"
        )
    needed = {}
    for tensor in plan.created:
        name = insertion.original(arch.gguf_name(tensor.name))
        if name:
            needed[name] = tensor
    for name, tensor in needed.items():
        filled = bool(tensor.value or tensor.diagonals)
        if filled and (name not in gguf.tensors or gguf.tensors[name].shape != tensor.shape):
            raise GGUFError(
                f"{gguf.path}: no tensor {name} of shape {list(tensor.shape)}, which the inserted "
                "block needs; give a GGUF of the same model"
            )
    for name in gguf.tensors:
        if insertion.copies(name) and name not in needed:
            raise GGUFError(
                f"{gguf.path}: {name}: the checkpoint has no such tensor, so what it should be in "
                "an inserted block is not known; give a GGUF of the same model"
            )
