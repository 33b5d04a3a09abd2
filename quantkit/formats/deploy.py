"""`quantkit deploy`: check that vLLM or SGLang loads an artifact, and build the command that serves it.

Tensor parallelism (Shoeybi et al., arXiv 1909.08053) splits every block by attention heads and by channels of the MLP.
Matrices that read the hidden states are split along their rows, matrices that write to them along their columns. So the
numbers of heads and channels must be divisible by the number of GPUs, a split along columns must fall between two groups, and
no split may go through a packed word. If there are fewer KV heads than GPUs, KV heads are replicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import FormatError, RecipeError
from quantkit.formats import FORMATS
from quantkit.formats.artifact import PackedReader
from quantkit.formats.convert import can_hold
from quantkit.formats.servers import SERVERS, Server, notes, refusal

#: Matrices that write to the hidden states, in every family.
_ROW_PARALLEL = ("o_proj", "down_proj")
#: Matrices of keys and values.
_KEYS_VALUES = ("k_proj", "v_proj")
_HEAD = "lm_head"


@dataclass(frozen=True)
class Deployment:
    """The command to run, and notes for the user."""

    command: list[str]
    notes: list[str]


def deployment(checkpoint: Checkpoint, model: str, engine: str, gpus: int, extra: Sequence[str] = ()) -> Deployment:
    """The command that serves a model.

    Args:
        checkpoint: the model.
        model: the model as the engine is told it: a folder or a Hub id.
        engine: a name in `SERVERS`.
        gpus: number of GPUs that every matrix is split across.
        extra: further arguments for the engine.

    Raises:
        FormatError: the engine does not load the model; the message says what to do instead.
        RecipeError: the model cannot be split across this number of GPUs.
    """
    server, found = SERVERS[engine], list[str]()
    packed = PackedReader(checkpoint) if "quantization_config" in checkpoint.config else None
    if packed is not None:
        found = _require_loadable(checkpoint, packed, server)
    if problem := _split_problem(checkpoint, packed, gpus):
        heads = checkpoint.config["num_attention_heads"]
        fitting = [str(n) for n in range(1, heads + 1) if _split_problem(checkpoint, packed, n) is None]
        raise RecipeError(f"--tensor-parallel {gpus}: {problem}; {checkpoint.folder} fits {', '.join(fitting)} GPUs")
    return Deployment([*server.command(model, gpus), *extra], found)


def _require_loadable(checkpoint: Checkpoint, packed: PackedReader, server: Server) -> list[str]:
    """Notes on how the engine loads an artifact.

    Raises:
        FormatError: the engine does not load it.
    """
    if reason := refusal(packed, server):
        remedy = f"`quantkit serve {checkpoint.folder}` runs it"
        if better := _loadable(checkpoint, packed, server):
            remedy = f"use `quantkit convert {checkpoint.folder} OUT --format {better}`"
        raise FormatError(f"{checkpoint.folder}: {server.name} does not load it ({reason}); {remedy}")
    return notes(packed, server)


def _loadable(checkpoint: Checkpoint, packed: PackedReader, server: Server) -> str | None:
    """The name of a format that can hold the same weights and that the engine loads; None if there is none."""
    schemes = {packed.scheme(module) for module in packed.modules}
    for name, candidate in FORMATS.items():
        loads = candidate.support_of(server.name, schemes).loads
        loads = loads and (_HEAD not in packed.modules or server.name in candidate.quantized_head)
        if loads and not packed.online and name != packed.format.name and can_hold(checkpoint, packed, name):
            return name
    return None


def _split_problem(checkpoint: Checkpoint, packed: PackedReader | None, gpus: int) -> str | None:
    """Why a model cannot be split across this number of GPUs; None if it can."""
    config = checkpoint.config
    heads, channels = config["num_attention_heads"], config.get("intermediate_size", 0)
    kv_heads = config.get("num_key_value_heads", heads)
    if heads % gpus:
        return f"{heads} attention heads are not divisible by {gpus}"
    if kv_heads % gpus and gpus % kv_heads:
        return f"{kv_heads} KV heads and {gpus} GPUs do not divide each other"
    if channels % gpus:
        return f"{channels} channels of the MLP are not divisible by {gpus}"
    for module in packed.modules if packed is not None and gpus > 1 else ():
        assert packed is not None
        if module != _HEAD and (problem := _matrix_split_problem(packed, module, gpus, kv_heads)):
            return f"{module}: {problem}"
    return None


def _matrix_split_problem(packed: PackedReader, module: str, gpus: int, kv_heads: int) -> str | None:
    """Why a packed matrix cannot be split into this number of parts; None if it can."""
    scheme, (rows, columns) = packed.scheme(module), packed.shape(module)
    per_word = 32 // scheme.bits if scheme.bits != 3 else 32
    if module.endswith(_ROW_PARALLEL):
        part = columns // gpus
        if scheme.group_size != -1 and part % scheme.group_size:
            return f"a part of {part} columns is not a multiple of the group size {scheme.group_size}"
        if packed.format.packed_columns(scheme) and part % per_word:
            return f"a part of {part} columns is not a multiple of the {per_word} values of a packed word"
        return None
    part = rows // (min(gpus, kv_heads) if module.endswith(_KEYS_VALUES) else gpus)
    if packed.format.packed_rows(scheme) and part % per_word:
        return f"a part of {part} rows is not a multiple of the {per_word} values of a packed word"
    return None
