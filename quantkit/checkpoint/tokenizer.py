"""Load the tokenizer from a checkpoint's folder."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a checkpoint's folder.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise CheckpointError(f"{folder}: holds no tokenizer (tokenizer.json); copy the original model's into the folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types, plain Exception among them
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    return tokenizer
