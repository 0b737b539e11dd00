"""What a recipe says of the files that are written."""

from typing import Annotated, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from bake.recipe.errors import ContradictionError
from bake.recipe.section import Section
from bake.recipe.values import FLOATS, FileType, PartSize, TensorType, Text

__all__ = ["Conversion", "EditedTypeName", "Export", "GGUFExport"]

EditedTypeName = Literal[
    "auto",
    "same",
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k",
    "q5_1",
    "q5_0",
    "q4_k",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "q3_k",
    "iq3_s",
    "q2_k",
]


class Conversion(Section):
    """A GGUF of the baked checkpoint by llama.cpp's converter; a bare type stands for it.

    The keys are the options of llama-quantize.
    """

    type: FileType = Field(
        description="The type of the file, as llama-quantize names it, or `base`: every matrix in "
        "the type that it has in export.gguf.base."
    )
    imatrix: Text | None = Field(
        default=None,
        description="The file of an importance matrix (.gguf or .dat), or `text`: one is computed "
        "on prompts.text.",
    )
    tensor_types: dict[Text, TensorType] = Field(
        default={},
        description="Types of single matrices, by a regular expression of their GGUF names; the "
        "first that is found counts.",
    )
    output_tensor_type: TensorType | None = Field(
        default=None, description="The type of output.weight, or of tied embeddings."
    )
    token_embedding_type: TensorType | None = Field(
        default=None, description="The type of the token embedding."
    )
    pure: bool = Field(
        default=False, description="Whether all matrices get the one type, without a mix."
    )

    @property
    def is_float(self) -> bool:
        """Whether the converter writes the type itself."""
        return self.type in FLOATS

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The short form too."""
        reference = handler(core)
        full = handler.resolve_ref_schema(reference)
        return {"anyOf": [full["properties"]["type"], reference]}

    @model_validator(mode="after")
    def _used(self) -> "Conversion":
        findings: list[tuple[tuple[str | int, ...], str]] = []
        for name in ("imatrix", *_TYPED, "pure"):
            if getattr(self, name) and self.is_float:
                findings.append(((name,), f"{self.type} is not quantised; leave it out"))
            elif getattr(self, name) and self.type == "base" and name != "imatrix":
                findings.append(((name,), "type: base has the type of every matrix; leave it out"))
        if findings:
            raise ContradictionError(findings)
        return self


_TYPED = ("tensor_types", "output_tensor_type", "token_embedding_type")


class GGUFExport(Section):
    """A GGUF file, written by patching one of the same model, or by converting the checkpoint."""

    base: Text | None = Field(
        default="demo",
        description="`demo`, or the path of a GGUF of the same model, which is patched; null "
        "under `convert`, but for its `type: base`.",
    )
    convert: Conversion | None = Field(
        default=None, description="The type to convert the baked checkpoint to, or null to patch."
    )
    edited_type: EditedTypeName = Field(
        default="auto",
        description="The type of the edited matrices; the others keep theirs. `auto` is the "
        "smallest that keeps the edit, `same` the base's own or a refusal. Under `convert` what "
        "the type has for them, unless one is named; if that is `auto` or `same`, the unedited "
        "checkpoint is converted and patched.",
    )

    split: PartSize | None = Field(
        default=None,
        description="Under `convert`: the most bytes of tensors in one file, as 4G or 500M, as "
        "llama-gguf-split takes them. A patched file has its base's parts.",
    )

    @property
    def part_size(self) -> int | None:
        """`split` in bytes."""
        if self.split is None:
            return None
        return int(self.split[:-1]) * {"M": 10**6, "G": 10**9}[self.split[-1]]

    @property
    def patches_converted(self) -> bool:
        """Whether the unedited checkpoint is converted, and its GGUF patched."""
        return self.convert is not None and self.named_type in ("auto", "same")

    @property
    def named_type(self) -> str | None:
        """The type of edited matrices where the recipe names one."""
        return self.edited_type if "edited_type" in self.model_fields_set else None

    @model_validator(mode="before")
    @classmethod
    def _no_base(cls, value: object) -> object:
        """Nothing is patched where the checkpoint is converted."""
        if isinstance(value, dict) and value.get("convert") is not None:
            return {"base": None, **value}
        return value

    @model_validator(mode="after")
    def _one_road(self) -> "GGUFExport":
        findings: list[tuple[tuple[str | int, ...], str]] = []
        mix = self.convert is not None and self.convert.type == "base"
        if self.convert is None and self.base is None:
            findings.append((("base",), "nothing to patch; give a GGUF, or export.gguf.convert"))
        if mix and self.base is None:
            findings.append((("base",), "convert.type is base; give the GGUF whose types it takes"))
        if self.convert and not mix and self.base is not None:
            message = "is patched, and convert takes the checkpoint; leave one of them out"
            findings.append((("base",), message))
        if self.split and self.convert is None:
            message = "a patched file has its base's parts; leave it out, or give a split base"
            findings.append((("split",), message))
        if self.convert and self.named_type and self.convert.is_float:
            message = f"convert.type is {self.convert.type}, for all matrices; leave it out"
            findings.append((("edited_type",), message))
        if findings:
            raise ContradictionError(findings)
        return self


class Export(Section):
    """What is written."""

    safetensors: bool = Field(
        default=True, description="Whether a safetensors checkpoint is written."
    )
    gguf: GGUFExport | None = Field(default=None, description="The GGUF file to write, or null.")
    adapters: Annotated[tuple[Literal["peft", "gguf"], ...], Field(strict=False)] = Field(
        default=(),
        description="LoRAs of the same edits to write beside it: for PEFT and vLLM, for llama.cpp "
        "(with the base GGUF).",
    )
    control_vector: bool = Field(
        default=False,
        description="Whether a control vector for llama.cpp is written, of edits that only add "
        "after blocks.",
    )
