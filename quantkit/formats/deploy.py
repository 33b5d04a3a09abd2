"""`quantkit deploy`: the command that serves an artifact with vLLM or SGLang, once it is clear that the engine loads it.

Tensor parallelism (Shoeybi et al., arXiv 1909.08053) cuts every block's matrices by attention heads and by channels of the
MLP: those that read the hidden states along their rows, those that write to it along their columns. So heads and channels
must come out even, a column cut must fall between two groups, and no cut may go through a packed word. Keys and values of
fewer heads than GPUs are copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import FormatError, RecipeError
from quantkit.formats import FORMATS
from quantkit.formats.artifact import PackedReader
from quantkit.formats.convert import can_hold
from quantkit.formats.servers import SERVERS, Server, notes, refusal

#: Matrices that write to the hidden states, of every family.
_ROW_PARALLEL = ("o_proj", "down_proj")
#: Matrices of keys and values.
_KEYS_VALUES = ("k_proj", "v_proj")
_HEAD = "lm_head"


@dataclass(frozen=True)
class Deployment:
    """What to run, and what to know about it."""

    command: list[str]
    notes: list[str]


def deployment(checkpoint: Checkpoint, model: str, engine: str, gpus: int, extra: Sequence[str] = ()) -> Deployment:
    """The command that serves a model.

    Args:
        checkpoint: the model.
        model: what the engine is to call it: a folder or a Hub id.
        engine: one of `SERVERS`.
        gpus: over which every matrix is shared out.
        extra: more arguments of the engine.

    Raises:
        FormatError: the engine does not load it; the message says what it would load.
        RecipeError: it cannot be shared out over so many GPUs.
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
    """What to know about how the engine loads an artifact.

    Raises:
        FormatError: it does not.
    """
    if reason := refusal(packed, server):
        remedy = f"`quantkit serve {checkpoint.folder}` runs it"
        if better := _loadable(checkpoint, packed, server):
            remedy = f"use `quantkit convert {checkpoint.folder} OUT --format {better}`"
        raise FormatError(f"{checkpoint.folder}: {server.name} does not load it ({reason}); {remedy}")
    return notes(packed, server)


def _loadable(checkpoint: Checkpoint, packed: PackedReader, server: Server) -> str | None:
    """A format that holds the same weights and that the engine loads."""
    schemes = {packed.scheme(module) for module in packed.modules}
    for name, form in FORMATS.items():
        loads = form.support_of(server.name, schemes).loads
        loads = loads and (_HEAD not in packed.modules or server.name in form.quantized_head)
        if loads and not packed.online and name != packed.format.name and can_hold(checkpoint, packed, name):
            return name
    return None


def _split_problem(checkpoint: Checkpoint, packed: PackedReader | None, gpus: int) -> str | None:
    """Why a model cannot be shared out over so many GPUs; None where it can."""
    config = checkpoint.config
    heads, channels = config["num_attention_heads"], config.get("intermediate_size", 0)
    shared = config.get("num_key_value_heads", heads)
    if heads % gpus:
        return f"{heads} attention heads do not come out even"
    if shared % gpus and gpus % shared:
        return f"{shared} heads of keys and values do not come out even"
    if channels % gpus:
        return f"{channels} channels of the MLP do not come out even"
    for module in packed.modules if packed is not None and gpus > 1 else ():
        assert packed is not None
        if module != _HEAD and (problem := _cut_problem(packed, module, gpus, shared)):
            return f"{module}: {problem}"
    return None


def _cut_problem(packed: PackedReader, module: str, gpus: int, shared: int) -> str | None:
    """Why a packed matrix cannot be cut into so many parts; None where it can."""
    scheme, (rows, columns) = packed.scheme(module), packed.shape(module)
    per_word = 32 // scheme.bits if scheme.bits != 3 else 32
    if module.endswith(_ROW_PARALLEL):
        part = columns // gpus
        if scheme.group_size != -1 and part % scheme.group_size:
            return f"a part of {part} columns is no whole number of groups of {scheme.group_size}"
        if packed.format.packed_columns(scheme) and part % per_word:
            return f"a part of {part} columns is no whole number of words of {per_word}"
        return None
    part = rows // (min(gpus, shared) if module.endswith(_KEYS_VALUES) else gpus)
    if packed.format.packed_rows(scheme) and part % per_word:
        return f"a part of {part} rows is no whole number of words of {per_word}"
    return None
