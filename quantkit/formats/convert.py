"""Change an artifact's format: a permutation of bits, never a re-quantization."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.files import write_json, write_tensors
from quantkit.checkpoint.reader import Checkpoint, read_json, sha256
from quantkit.checkpoint.safetensors_header import quoted
from quantkit.checkpoint.storage_dtype import storage_dtype
from quantkit.checkpoint.writer import Workspace
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats import FORMATS, ModuleSchemes, encode
from quantkit.formats.artifact import PackedReader, bits_per_weight, write_metadata
from quantkit.formats.model_card import write_model_card
from quantkit.methods.scheme import Scheme
from quantkit.utils.renamed_keys import with_current_keys

#: Called with what is counted, how many are done, and how many there are.
Advance = Callable[[str, int, int], None]


def convert(source: Path, out: Path, format_name: str, *, overwrite: bool, advance: Advance | None = None) -> int:
    """Write the artifact at `source` in format `format_name` to `out`, shard by shard. Returns the number of matrices.

    `advance`, if given, is called with ("shards", shards written, shards) before the first shard and after each.

    Raises:
        CheckpointError: the source is damaged.
        FormatError: the source is not quantized, or `format_name` cannot hold its grid exactly.
        ArtifactError: OUT is in the way.
    """
    Workspace.require_free(out, source, overwrite=overwrite)
    checkpoint = Checkpoint(source)
    if "quantization_config" not in checkpoint.config:
        raise FormatError(f"{source}: is not quantized; use `quantkit quantize`")
    packed = PackedReader(checkpoint)
    plan = _plan(checkpoint, packed)
    _require_room(checkpoint.folder, packed, plan, format_name)
    stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files}
    identity = {"convert": str(source.resolve()), "source": stamps, "to": format_name}
    with Workspace(out, identity, source=source, overwrite=overwrite) as workspace:
        _make(checkpoint, packed, plan, workspace, format_name, advance or (lambda stage, done, total: None))
    return len(packed.modules)


def can_hold(checkpoint: Checkpoint, packed: PackedReader, format_name: str) -> bool:
    """Whether `format_name` can hold an artifact, as far as headers and config show."""
    try:
        _require_room(checkpoint.folder, packed, _plan(checkpoint, packed), format_name)
    except FormatError:
        return False
    return True


def _require_room(source: Path, packed: PackedReader, plan: ModuleSchemes, format_name: str) -> None:
    """Refuse, before any work, what headers and config already show.

    Raises:
        FormatError: `format_name` cannot hold the artifact.
    """
    if packed.online and not FORMATS[format_name].holds_transform:
        reason = f"is rotated, which the {format_name} format has no field for"
        raise FormatError(f"{source}: {reason}; quantize again without rotate")
    for module, scheme in plan.items():
        if scheme is not None and (problem := FORMATS[format_name].unsupported_reason(scheme, *packed.shape(module))):
            raise FormatError(f"{source}: {module}: {problem}")
    try:
        FORMATS[format_name].config(plan)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None


def _make(
    checkpoint: Checkpoint, packed: PackedReader, plan: ModuleSchemes, workspace: Workspace, format_name: str, advance: Advance
) -> None:
    """From an open workspace to the published artifact, shard by shard."""
    done = len(workspace.finished)
    advance("shards", done, len(checkpoint.files))
    for number, file in enumerate(checkpoint.files[done:], start=done):
        shard = f"shard-{number:05}.safetensors"
        write_tensors(workspace.folder / shard, _converted(checkpoint, packed, file, format_name))
        workspace.commit({"shard": shard})
        advance("shards", number + 1, len(checkpoint.files))
    folder, shards = workspace.merge_shards()
    write_metadata(checkpoint, folder, format_name, plan, packed.online)
    made = checkpoint.folder / "quantkit.json"
    if made.is_file():
        write_json(folder / "quantkit.json", _report(made, folder, shards, format_name))
    write_model_card(folder, checkpoint)
    workspace.publish()


def _report(made: Path, folder: Path, shards: list[Path], format_name: str) -> dict[str, Any]:
    """The source's report with what is different now; its recipe still gives these very tensors.

    Raises:
        CheckpointError: it is not a report.
    """
    report, written = read_json(made), Checkpoint(folder)
    packed = PackedReader(written)
    size = {"bits_per_weight": bits_per_weight(written), "size_bytes": sum(path.stat().st_size for path in shards)}
    try:
        return report | {
            "recipe": with_current_keys(report["recipe"]) | {"format": format_name},
            "output_sha256": {path.name: sha256(path) for path in shards},
            "engines": [asdict(engine) for engine in packed.engines()],
            "totals": report["totals"] | size,
        }
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{made}: is not a report of quantkit's; delete it, or fetch the model again") from None


def _plan(checkpoint: Checkpoint, packed: PackedReader) -> ModuleSchemes:
    """Scheme of every packed matrix; None for the linear layers that are not packed."""
    plan: dict[str, Scheme | None] = {module: packed.scheme(module) for module in packed.modules}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module != name and len(info.shape) == 2 and "embed" not in module:
            plan[module] = None
    return plan | {"lm_head": plan.get("lm_head")}


def _converted(checkpoint: Checkpoint, packed: PackedReader, file: Path, format_name: str) -> dict[str, Tensor]:
    """What one shard becomes: a packed matrix moves with its first tensor, everything else stays where it is."""
    dtype: torch.dtype = storage_dtype(checkpoint)
    owners = {f"{module}.{suffix}": module for module in packed.modules for suffix in packed.format.suffixes}
    here = [name for name, info in checkpoint.tensors.items() if info.file == file]
    tensors = checkpoint.read(name for name in here if name not in owners)
    for name in here:
        module = owners.get(name)
        if module is None or not name.endswith("." + packed.format.suffixes[0]):
            continue
        encoded = encode(format_name, packed.read(module), dtype, f"{file}: {quoted(module)}")
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in encoded.items()}
    return tensors
