"""Change an artifact's format: a permutation of bits, never a re-quantization."""

from pathlib import Path

import torch
from torch import Tensor

from quantkit.artifact import PackedReader, write_metadata
from quantkit.checkpoint.reader import Checkpoint, read_json
from quantkit.checkpoint.writer import Workspace, write_json, write_tensors
from quantkit.errors import FormatError, QuantkitError
from quantkit.formats import FORMATS, Plan
from quantkit.methods.grid import Scheme
from quantkit.prepare import storage_dtype


def convert(source: Path, out: Path, form: str, *, overwrite: bool) -> int:
    """Write the artifact at `source` in format `form` to `out`, shard by shard. Returns the number of matrices.

    Raises:
        FormatError: the source is not quantized, or `form` cannot hold its grid exactly.
        ArtifactError: OUT is in the way.
    """
    Workspace.require_free(out, overwrite=overwrite)
    checkpoint = Checkpoint(source)
    if "quantization_config" not in checkpoint.config:
        raise FormatError(f"{source}: is not quantized; use `quantkit quantize`")
    packed = PackedReader(checkpoint)
    plan = _plan(checkpoint, packed)
    for module, scheme in plan.items():
        if scheme is not None:
            rows, columns = packed.shape(module)
            if problem := FORMATS[form].problem(scheme, rows, columns):
                raise FormatError(f"{module}: {problem}")
    workspace = Workspace(out, {"convert": str(source), "to": form}, overwrite=True)
    try:
        for number, file in enumerate(checkpoint.files[len(workspace.finished) :], start=len(workspace.finished)):
            shard = f"shard-{number:05}.safetensors"
            write_tensors(workspace.folder / shard, _converted(checkpoint, packed, file, form))
            workspace.commit({"shard": shard})
        folder, _ = workspace.join()
        write_metadata(checkpoint, folder, form, plan)
        made = source / "quantkit.json"
        if made.is_file():
            write_json(folder / "quantkit.json", read_json(made) | {"converted_to": form})
        workspace.publish()
    except QuantkitError:
        workspace.discard()
        raise
    return len(packed.modules)


def _plan(checkpoint: Checkpoint, packed: PackedReader) -> Plan:
    """Scheme of every packed matrix; None for the linear layers that are not packed."""
    plan: dict[str, Scheme | None] = {module: packed.scheme(module) for module in packed.modules}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module != name and len(info.shape) == 2 and "embed" not in module:
            plan[module] = None
    return plan | {"lm_head": plan.get("lm_head")}


def _converted(checkpoint: Checkpoint, packed: PackedReader, file: Path, form: str) -> dict[str, Tensor]:
    """What one shard becomes: a packed matrix moves with its first tensor, everything else stays where it is."""
    dtype: torch.dtype = storage_dtype(checkpoint)
    owners = {f"{module}.{suffix}": module for module in packed.modules for suffix in packed.form.suffixes}
    here = [name for name, info in checkpoint.tensors.items() if info.file == file]
    tensors = checkpoint.read(name for name in here if name not in owners)
    for name in here:
        module = owners.get(name)
        if module is None or not name.endswith("." + packed.form.suffixes[0]):
            continue
        try:
            encoded = FORMATS[form].encode(packed.read(module), dtype)
        except FormatError as error:
            raise FormatError(f"{module}: {error}") from None
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in encoded.items()}
    return tensors
