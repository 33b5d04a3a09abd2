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

#: Called with the name of what is counted, the number done, and the total.
Advance = Callable[[str, int, int], None]


def convert(source: Path, out: Path, format_name: str, *, overwrite: bool, advance: Advance | None = None) -> int:
    """Write the artifact at `source` in format `format_name` to `out`, shard by shard. Returns the number of matrices.

    `advance`, if given, is called with ("shards", shards written, total shards) before the first shard and after each one.

    Raises:
        CheckpointError: the source is damaged.
        FormatError: the source is not quantized, or `format_name` cannot hold its grid exactly.
        ArtifactError: `out` exists and may not be replaced.
    """
    Workspace.require_free(out, source, overwrite=overwrite)
    checkpoint = Checkpoint(source)
    if "quantization_config" not in checkpoint.config:
        raise FormatError(f"{source}: is not quantized; use `quantkit quantize`")
    packed = PackedReader(checkpoint)
    schemes = _module_schemes(checkpoint, packed)
    _require_convertible(checkpoint.folder, packed, schemes, format_name)
    stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files}
    identity = {"convert": str(source.resolve()), "source": stamps, "to": format_name}
    with Workspace(out, identity, source=source, overwrite=overwrite) as workspace:
        _convert_shards(checkpoint, packed, schemes, workspace, format_name, advance or (lambda stage, done, total: None))
    return len(packed.modules)


def can_hold(checkpoint: Checkpoint, packed: PackedReader, format_name: str) -> bool:
    """Whether `format_name` can hold an artifact, as far as headers and config show."""
    try:
        _require_convertible(checkpoint.folder, packed, _module_schemes(checkpoint, packed), format_name)
    except FormatError:
        return False
    return True


def _require_convertible(source: Path, packed: PackedReader, schemes: ModuleSchemes, format_name: str) -> None:
    """Check, before any work, whether headers and config show that the conversion is impossible.

    Raises:
        FormatError: `format_name` cannot hold the artifact.
    """
    if packed.online and not FORMATS[format_name].holds_transform:
        reason = f"is rotated, which the {format_name} format has no field for"
        raise FormatError(f"{source}: {reason}; quantize again without rotate")
    for module, scheme in schemes.items():
        if scheme is not None and (unsupported := FORMATS[format_name].unsupported_reason(scheme, *packed.shape(module))):
            raise FormatError(f"{source}: {module}: {unsupported}")
    try:
        FORMATS[format_name].config(schemes)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None


def _convert_shards(
    checkpoint: Checkpoint,
    packed: PackedReader,
    schemes: ModuleSchemes,
    workspace: Workspace,
    format_name: str,
    advance: Advance,
) -> None:
    """Convert the shards that the workspace does not have yet, then publish the artifact."""
    done = len(workspace.finished)
    advance("shards", done, len(checkpoint.files))
    for number, file in enumerate(checkpoint.files[done:], start=done):
        shard = f"shard-{number:05}.safetensors"
        write_tensors(workspace.folder / shard, _converted(checkpoint, packed, file, format_name))
        workspace.commit({"shard": shard})
        advance("shards", number + 1, len(checkpoint.files))
    folder, shards = workspace.merge_shards()
    write_metadata(checkpoint, folder, format_name, schemes, packed.online)
    made = checkpoint.folder / "quantkit.json"
    if made.is_file():
        write_json(folder / "quantkit.json", _report(made, folder, shards, format_name))
    write_model_card(folder, checkpoint)
    workspace.publish()


def _report(made: Path, folder: Path, shards: list[Path], format_name: str) -> dict[str, Any]:
    """The source's report with updated entries. Its recipe, with the new format, gives exactly these tensors.

    Raises:
        CheckpointError: the file is not a report.
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
        raise CheckpointError(f"{made}: is not a report that quantkit wrote; delete it, or fetch the model again") from None


def _module_schemes(checkpoint: Checkpoint, packed: PackedReader) -> ModuleSchemes:
    """Scheme of every packed matrix; None for the linear layers that are not packed."""
    schemes: dict[str, Scheme | None] = {module: packed.scheme(module) for module in packed.modules}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module != name and len(info.shape) == 2 and "embed" not in module:
            schemes[module] = None
    return schemes | {"lm_head": schemes.get("lm_head")}


def _converted(checkpoint: Checkpoint, packed: PackedReader, file: Path, format_name: str) -> dict[str, Tensor]:
    """The tensors of one converted shard. A packed matrix goes to its first tensor's shard; other tensors stay in theirs."""
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
