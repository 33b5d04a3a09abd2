"""Prepare a run: check the source, resolve the recipe, and turn the calibration text into rows of tokens."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, sha256
from quantkit.checkpoint.storage_dtype import storage_dtype
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.data.corpus import calibration_rows, tokens_sha256
from quantkit.errors import RecipeError
from quantkit.formats import FORMATS, EngineSupport
from quantkit.formats.rotated import OnlineHadamard, mark_unsupported
from quantkit.methods import METHODS
from quantkit.methods.base import SolverSettings
from quantkit.methods.scheme import Scheme
from quantkit.models.streaming import StreamedModel, TensorReader, check_tensors
from quantkit.quantization.calibration import MICRO_BATCH_TOKENS
from quantkit.quantization.rotation import Rotation
from quantkit.recipe import Recipe, resolved_json
from quantkit.version import __version__

#: One calibration row in this many also runs through the original model. On the model of `benchmarks/quality.py`, a quarter of
#: the rows gives a KL divergence of 0.085; an eighth gives 0.086 and saves 14 of 303 CPU seconds; a sixteenth gives 0.098.
REFERENCE_SHARE = 8

#: The group sizes that `group_size: auto` chooses from, largest first.
_GROUP_SIZES = (128, 64, 32, 16)


@dataclass
class QuantizationJob:
    """A run that is ready to start.

    Attributes:
        checkpoint: the source.
        read: reads its tensors, rotated if the recipe says so.
        online: the rotation that the runtime must apply; None without one.
        model: the model, whose blocks are streamed.
        recipe: the recipe without any "auto".
        schemes: the scheme of every matrix of every block and of the head, by module path; None if it stays in 16 bit.
        tokens: calibration tokens, int64 [rows, T]; None if the method needs no data.
        hessian_dtype: the dtype in which Hessians are multiplied. Like the model's `matmul_dtype`, it is decided when the run
            starts.
    """

    checkpoint: Checkpoint
    read: TensorReader
    online: OnlineHadamard | None
    model: StreamedModel
    recipe: Recipe
    schemes: Mapping[str, Scheme | None]
    tokens: Tensor | None
    hessian_dtype: torch.dtype = torch.float32

    @cached_property
    def settings(self) -> SolverSettings:
        """How matrices are solved."""
        recipe = self.recipe
        return SolverSettings(
            method=METHODS[recipe.method],
            act_order=recipe.act_order,
            damping=recipe.damping,
            asymmetric_calibration=recipe.asymmetric_calibration,
            coordinate_descent_passes=recipe.coordinate_descent_passes,
            dtype=self.model.dtype,
        )

    @property
    def stream_rows(self) -> list[int]:
        """Number of calibration rows per stream: for the quantized model and, if the method needs it, for the original."""
        assert self.tokens is not None
        rows, batch = len(self.tokens), self.rows_per_batch
        reference = min(-(-rows // (REFERENCE_SHARE * batch)) * batch, rows)
        return [rows, reference] if self.settings.needs_reference else [rows]

    @property
    def non_block_tensors(self) -> list[str]:
        """Names of the tensors outside the blocks that are not quantized. A rotated model has a head of its own."""
        prefix, head = self.model.family.blocks_path + ".", "lm_head.weight"
        stored = dict.fromkeys([*self.checkpoint.tensors, *([head] if self.online else [])])
        return [name for name in stored if not name.startswith(prefix) and (name != head or self.schemes["lm_head"] is None)]

    def stored_bytes(self, name: str) -> int:
        """Bytes of one of the `non_block_tensors`. A head that the source lacks is as large as the embedding."""
        stored = self.checkpoint.tensors.get(name)
        return self.model.head_weight.nbytes if stored is None else stored.nbytes

    def block_schemes(self, index: int) -> dict[str, Scheme]:
        """The schemes of the matrices to quantize in block `index`, by module name inside the block."""
        prefix = self.model.prefix(index)
        chosen = {name: self.schemes[prefix + name] for name in self.model.family.matrices}
        return {name: scheme for name, scheme in chosen.items() if scheme is not None}

    @property
    def rows_per_batch(self) -> int:
        """Number of calibration rows per micro-batch."""
        assert self.tokens is not None
        return max(1, MICRO_BATCH_TOKENS // self.tokens.shape[1])

    def token_batches(self) -> Iterator[Tensor]:
        """The calibration tokens of each micro-batch."""
        assert self.tokens is not None
        yield from self.tokens.split(self.rows_per_batch)

    def block_kwargs(self, index: int) -> Callable[[int], dict[str, Any]]:
        """The keyword arguments of block `index` as a function of the number of rows; all rows are full."""
        return lambda rows: self.recorded_kwargs[rows][index]

    @cached_property
    def recorded_kwargs(self) -> dict[int, list[dict[str, Any]]]:
        """Every block's keyword arguments, for each size of a micro-batch that occurs. Needs the embeddings."""
        if self.tokens is None:
            return {}
        sizes = {size for rows in self.stream_rows for size in (min(rows, self.rows_per_batch), rows % self.rows_per_batch)}
        return {size: self.model.embed(self.tokens[:size])[1] for size in sizes if size}

    def activation_bytes(self) -> tuple[int, int]:
        """Bytes of the hidden states between two blocks, and bytes that paused micro-batches hold.

        A paused micro-batch holds its residual, a tensor as wide as the widest group's input and, in attention, the queries.
        """
        assert self.tokens is not None
        values = sum(self.stream_rows) * self.tokens.shape[1] * self.model.dtype.itemsize
        widest = max(self.model.shape(0, name)[1] for name in self.model.family.matrices)
        return values * self.model.config.hidden_size, values * (2 * self.model.config.hidden_size + widest)

    def unquantized(self) -> dict[str, str]:
        """Why each matrix that stays in 16 bit is not quantized, by module path."""
        reasons = {name: "skipped by a rule" for name, scheme in self.schemes.items() if scheme is None}
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        if "lm_head" in reasons:
            reasons["lm_head"] = "no rule names the output head" + (" (tied to the embedding)" if tied else "")
        return reasons | {"model.embed_tokens": "embeddings are looked up, not multiplied"}

    def engines(self) -> list[EngineSupport]:
        """The engines, and whether each loads the artifact."""
        engines = FORMATS[self.recipe.format].engines({scheme for scheme in self.schemes.values() if scheme is not None})
        return mark_unsupported(engines) if self.online else engines

    @cached_property
    def source_sha256(self) -> dict[str, str]:
        """SHA-256 of the source's config.json and shards, by file name."""
        files = (self.checkpoint.folder / "config.json", *self.checkpoint.files)
        return {path.name: sha256(path) for path in files}

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bits of the result. An unfinished run is continued only if it is equal."""
        return {
            "recipe": resolved_json(self.recipe),
            "source": self.source_sha256,
            "calibration tokens": None if self.tokens is None else tokens_sha256(self.tokens),
            "versions": versions(),
            "device": self.model.device.type,
        }


def versions() -> dict[str, str]:
    """The versions of the software on which the result depends."""
    return {
        "quantkit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def prepare_job(folder: Path, recipe: Recipe, device: torch.device) -> QuantizationJob:
    """Check the source and resolve the recipe.

    Raises:
        CheckpointError, RecipeError, CorpusError: the source, the recipe or the calibration text cannot be used.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.require_unquantized()
    model = StreamedModel(checkpoint, checkpoint.read, storage_dtype(checkpoint), device)
    check_tensors(checkpoint, model)
    read, online = checkpoint.read, None
    if recipe.rotate:
        if not FORMATS[recipe.format].holds_transform:
            others = " or ".join(name for name, each in FORMATS.items() if each.holds_transform)
            raise RecipeError(f"rotate: the {recipe.format} format has no field for it; use --format {others}")
        model.release_non_block_weights()
        read = Rotation(checkpoint, model.family, model.config)
        online = read.online
        model = StreamedModel(checkpoint, read, model.dtype, device, online)
    recipe = _with_group_size(recipe, model)
    plan = _plan(recipe, model)
    tokens = None
    if recipe.calibrates:
        rows = calibration_rows(recipe.calibration, recipe.seed, load_tokenizer(checkpoint))
        # The first rows also run through the original model. Taken from the whole text, they generalize better.
        tokens = torch.cat([rows[first::REFERENCE_SHARE] for first in range(REFERENCE_SHARE)])
        longest = getattr(model.config, "max_position_embeddings", math.inf)
        if tokens.shape[1] > longest:
            raise RecipeError(f"--seq-len {tokens.shape[1]} is longer than the model's context of {longest}")
    return QuantizationJob(checkpoint, read, online, model, recipe, plan, tokens)


def _with_group_size(recipe: Recipe, model: StreamedModel) -> Recipe:
    """`recipe`, with every "auto" replaced by the largest group size that divides the columns of all matrices."""
    columns = {model.shape(0, name)[1] for name in model.family.matrices}
    auto = next((size for size in _GROUP_SIZES if all(k % size == 0 for k in columns)), -1)
    rules = tuple(r.model_copy(update={"group_size": auto}) if r.group_size == "auto" else r for r in recipe.rules)
    size = auto if recipe.group_size == "auto" else recipe.group_size
    return recipe.model_copy(update={"group_size": size, "rules": rules})


def _plan(recipe: Recipe, model: StreamedModel) -> dict[str, Scheme | None]:
    """The scheme of every matrix, by module path, checked against the format.

    Raises:
        RecipeError, FormatError: the format cannot store a matrix or the mix of schemes, or nothing is left to quantize.
    """
    form = FORMATS[recipe.format]
    plan: dict[str, Scheme | None] = {}
    shapes = {
        model.prefix(index) + name: model.shape(index, name)
        for index in range(model.block_count)
        for name in model.family.matrices
    }
    for path, (rows, columns) in (shapes | {"lm_head": model.head_weight.shape}).items():
        scheme = plan[path] = recipe.scheme(path)
        if scheme is not None and (problem := form.unsupported_reason(scheme, rows, columns)):
            raise RecipeError(f"{path}: {problem}")
    if not any(plan.values()):
        raise RecipeError("the recipe's rules skip every matrix: nothing would be quantized")
    form.config(plan)  # Raises now rather than at the end if the format cannot mix schemes.
    return plan
