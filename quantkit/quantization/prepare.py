"""Everything that is settled before the first block: the source is checked, the recipe resolved, the text cut into rows."""

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

import quantkit
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

#: The original model walks beside the quantized one for one row in this many. On the quality base a quarter of the rows gives
#: a KL divergence of 0.085 and an eighth 0.086 for 14 CPU seconds less of 303; a sixteenth gives 0.098.
REFERENCE_SHARE = 8

#: What `group_size: auto` chooses from, largest first.
_GROUP_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class QuantizationJob:
    """A run that can start.

    Attributes:
        checkpoint: the source.
        read: its tensors, rotated if the recipe says so.
        online: what the runtime must then do.
        model: its blocks.
        recipe: resolved: no "auto" left.
        schemes: module path -> scheme, None for what stays in 16 bit; every matrix of every block, and the head.
        tokens: int64 [rows, T], None when the method looks at no data.
    """

    checkpoint: Checkpoint
    read: TensorReader
    online: OnlineHadamard | None
    model: StreamedModel
    recipe: Recipe
    schemes: Mapping[str, Scheme | None]
    tokens: Tensor | None

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
        """Calibration rows of every version of the model that walks: the quantized one, and the original if it is needed."""
        assert self.tokens is not None
        rows, batch = len(self.tokens), self.rows_per_batch
        reference = min(-(-rows // (REFERENCE_SHARE * batch)) * batch, rows)
        return [rows, reference] if self.settings.needs_reference else [rows]

    @property
    def non_block_tensors(self) -> list[str]:
        """Names of the tensors outside the blocks that are written as they are, or rotated; a rotated head is never tied."""
        prefix, head = self.model.family.blocks_path + ".", "lm_head.weight"
        stored = dict.fromkeys([*self.checkpoint.tensors, *([head] if self.online else [])])
        return [name for name in stored if not name.startswith(prefix) and (name != head or self.schemes["lm_head"] is None)]

    def stored_bytes(self, name: str) -> int:
        """Bytes of one of them; a head that the source does not have is as large as the embedding."""
        stored = self.checkpoint.tensors.get(name)
        return self.model.head_weight.nbytes if stored is None else stored.nbytes

    def block_schemes(self, index: int) -> dict[str, Scheme]:
        """Module name inside block `index` -> scheme, quantized ones only."""
        prefix = self.model.prefix(index)
        chosen = {name: self.schemes[prefix + name] for name in self.model.family.matrices}
        return {name: scheme for name, scheme in chosen.items() if scheme is not None}

    @property
    def rows_per_batch(self) -> int:
        """Calibration rows in a micro-batch."""
        assert self.tokens is not None
        return max(1, MICRO_BATCH_TOKENS // self.tokens.shape[1])

    def token_batches(self) -> Iterator[Tensor]:
        """Calibration tokens, a micro-batch at a time."""
        assert self.tokens is not None
        yield from self.tokens.split(self.rows_per_batch)

    def block_kwargs(self, index: int) -> Callable[[int], dict[str, Any]]:
        """Keyword arguments of block `index` for a batch of that many rows; rows are full, so only their number matters."""
        return lambda rows: self.recorded_kwargs[rows][index]

    @cached_property
    def recorded_kwargs(self) -> dict[int, list[dict[str, Any]]]:
        """Rows in a micro-batch -> every block's keyword arguments, for the sizes that occur. Needs the embeddings."""
        if self.tokens is None:
            return {}
        sizes = {size for rows in self.stream_rows for size in (min(rows, self.rows_per_batch), rows % self.rows_per_batch)}
        return {size: self.model.embed(self.tokens[:size])[1] for size in sizes if size}

    def activation_bytes(self) -> tuple[int, int]:
        """Bytes of the hidden states between blocks, and of what paused micro-batches hold at a group's matrices.

        A paused micro-batch holds its residual, a place as wide as any group's input and, inside attention, the queries.
        """
        assert self.tokens is not None
        values = sum(self.stream_rows) * self.tokens.shape[1] * self.model.dtype.itemsize
        widest = max(self.model.shape(0, name)[1] for name in self.model.family.matrices)
        return values * self.model.config.hidden_size, values * (2 * self.model.config.hidden_size + widest)

    def unquantized(self) -> dict[str, str]:
        """Matrices that stay in 16 bit -> why."""
        reasons = {name: "skipped by a rule" for name, scheme in self.schemes.items() if scheme is None}
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        if "lm_head" in reasons:
            reasons["lm_head"] = "no rule names the output head" + (" (tied to the embedding)" if tied else "")
        return reasons | {"model.embed_tokens": "embeddings are looked up, not multiplied"}

    def engines(self) -> list[EngineSupport]:
        """Which engines load the result."""
        engines = FORMATS[self.recipe.format].engines({scheme for scheme in self.schemes.values() if scheme is not None})
        return mark_unsupported(engines) if self.online else engines

    @cached_property
    def source_sha256(self) -> dict[str, str]:
        """SHA-256 of the source's config and shards."""
        files = (self.checkpoint.folder / "config.json", *self.checkpoint.files)
        return {path.name: sha256(path) for path in files}

    def identity(self) -> dict[str, Any]:
        """What must be equal for an unfinished run to go on: everything that decides a bit of the result."""
        return {
            "recipe": resolved_json(self.recipe),
            "source": self.source_sha256,
            "calibration tokens": None if self.tokens is None else tokens_sha256(self.tokens),
            "versions": versions(),
            "device": self.model.device.type,
        }


def versions() -> dict[str, str]:
    """What the result depends on beside recipe and source."""
    return {
        "quantkit": quantkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def prepare_job(folder: Path, recipe: Recipe, device: torch.device) -> QuantizationJob:
    """Check the source and settle the recipe.

    Raises:
        CheckpointError, RecipeError, CorpusError: the first thing that is wrong.
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
        # The first rows also walk through the original model; taken from all over the text they generalise better.
        tokens = torch.cat([rows[first::REFERENCE_SHARE] for first in range(REFERENCE_SHARE)])
        longest = getattr(model.config, "max_position_embeddings", math.inf)
        if tokens.shape[1] > longest:
            raise RecipeError(f"--seq-len {tokens.shape[1]} is longer than the model's context of {longest}")
    return QuantizationJob(checkpoint, read, online, model, recipe, plan, tokens)


def _with_group_size(recipe: Recipe, model: StreamedModel) -> Recipe:
    """`recipe` with every "auto" replaced by the largest common size that divides all matrices."""
    columns = {model.shape(0, name)[1] for name in model.family.matrices}
    auto = next((size for size in _GROUP_SIZES if all(k % size == 0 for k in columns)), -1)
    rules = tuple(r.model_copy(update={"group_size": auto}) if r.group_size == "auto" else r for r in recipe.rules)
    size = auto if recipe.group_size == "auto" else recipe.group_size
    return recipe.model_copy(update={"group_size": size, "rules": rules})


def _plan(recipe: Recipe, model: StreamedModel) -> dict[str, Scheme | None]:
    """Every matrix's scheme, checked against the format.

    Raises:
        RecipeError, FormatError: the format cannot hold a matrix or the mixture, or nothing is left to quantize.
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
    form.config(plan)  # Not every format can mix schemes; better said now than at the end.
    return plan
