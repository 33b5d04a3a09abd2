"""Find the folder of the model that the user named: a local folder, a Hub id, or `demo`."""

from pathlib import Path

from quantkit.checkpoint.demo import HUB_ID, demo_folder
from quantkit.errors import CheckpointError
from quantkit.utils.cache_dir import cache_dir

#: The files of a Hub repository that a model needs. Pickled weights are never fetched.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "*.md"]


def locate(model: str) -> Path:
    """The folder of MODEL. A Hub repository and the demo model are fetched first, if they are not there yet.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be fetched.
    """
    if model == "demo":
        return demo_folder()
    path = local_folder(model)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:  # the Hub client raises exceptions of three libraries
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{model}: no such folder, and it cannot be fetched from the Hub ({reason}); check the name and the network"
        ) from error


def local_folder(model: str) -> Path | None:
    """The folder that MODEL names; None for "demo" and for a Hub id, which are fetched. Imports no large library.

    Raises:
        CheckpointError: MODEL is a file, or neither a folder that exists nor a Hub id.
    """
    if model == "demo":
        return None
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; name the folder that holds config.json and the shards")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such folder (a Hub id looks like 'owner/name'; the embedded model is 'demo')")
    return None


def hub_id(folder: Path) -> str | None:
    """The Hub id of a folder that `locate` fetched, derived from its path in the cache; None for any other folder."""
    if folder == cache_dir() / "demo":
        return HUB_ID
    # .../models--OWNER--NAME/snapshots/REVISION
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)
