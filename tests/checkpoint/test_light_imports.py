"""What the command line needs to list and inspect is imported without the large libraries, in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "huggingface_hub")

LIGHT = (
    "import quantkit.checkpoint.reader",
    "import quantkit.checkpoint.locate",
    "import quantkit.data.prompts",
    "import quantkit.quantization.report",
    "from quantkit.data.corpus import text_sets; assert text_sets()['builtin'].dataset == 'builtin'",
)


def run(code: str) -> str:
    """The large libraries that a fresh interpreter has imported after `code`."""
    report = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("code", LIGHT)
def test_imported_without_the_large_libraries(code: str) -> None:
    assert run(code) == ""


def test_a_folder_is_opened_without_torch(llama_bf16: Path) -> None:
    imports = "from pathlib import Path; from quantkit.checkpoint.reader import Checkpoint"
    opening = f"{imports}; c = Checkpoint(Path({str(llama_bf16)!r}))"
    assert run(f"{opening}; assert sum(info.nbytes for info in c.tensors.values()) > 0") == ""
    assert run(f"{opening}; c.read(['lm_head.weight'])") == "torch"


def test_the_check_sees_an_import() -> None:
    assert run("import torch") == "torch"
