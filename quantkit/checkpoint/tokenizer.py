"""Load the tokenizer from a checkpoint's folder."""

from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.reader import Checkpoint, read_json
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(checkpoint: Checkpoint) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies in a checkpoint's folder.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    from transformers import AutoTokenizer  # slow to import

    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise CheckpointError(f"{folder}: holds no tokenizer (tokenizer.json); copy the original model's into the folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=_config(checkpoint), local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise many types, plain Exception among them
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    return tokenizer


def _config(checkpoint: Checkpoint) -> Any:
    """What transformers needs of the model's config to choose the tokenizer's class; None: let it read the config itself.

    That would import the classes of the model's config, and with them most of the modelling code. They are needed only if no
    file names the tokenizer's class.
    """
    from transformers import PreTrainedConfig

    path = checkpoint.folder / "tokenizer_config.json"
    named = (read_json(path) if path.is_file() else {}).get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    if named is None:
        return None
    kept = {key: checkpoint.config[key] for key in ("model_name", "tokenizer_class") if key in checkpoint.config}
    config = PreTrainedConfig(name_or_path=str(checkpoint.folder), **kept)
    config.model_type = checkpoint.config["model_type"]
    return config
