"""The dtype in which a checkpoint stores its matrices."""

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safetensors_header import DTYPES
from quantkit.errors import CheckpointError


def storage_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json declares; if it declares none, that of the largest floating-point tensor.

    Raises:
        CheckpointError: the dtype is not one that a model can be stored in.
    """
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if declared is None:
        floating = [info for info in checkpoint.tensors.values() if info.is_floating_point]
        declared = DTYPES[max(floating, key=lambda info: info.nbytes).dtype].torch_name if floating else "nothing"
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if str(declared) not in known:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: dtype '{declared}' is not one of {', '.join(known)}")
    return known[str(declared)]
