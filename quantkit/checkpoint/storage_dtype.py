"""The dtype in which a checkpoint stores its matrices."""

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError


def storage_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json declares; that of the largest floating tensor where it declares none.

    Raises:
        CheckpointError: it is no floating type that a model can be stored in.
    """
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if declared is None:
        floating = [info for info in checkpoint.tensors.values() if info.dtype.is_floating_point]
        declared = str(max(floating, key=lambda info: info.nbytes).dtype).removeprefix("torch.") if floating else "nothing"
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if str(declared) not in known:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: dtype '{declared}' is not one of {', '.join(known)}")
    return known[str(declared)]
