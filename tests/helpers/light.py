"""A process of its own that generates a text, and says which modules it has imported.

usage: python -m helpers.light (generate | serve) FOLDER
"""

import json
import sys
from pathlib import Path

from quantkit import LLM, SamplingParams

PROMPT, LENGTH = "The capital of France is", 24


def generate(folder: Path) -> str:
    """The text that `quantkit generate` prints."""
    (output,) = LLM(folder, kv_memory=1 << 22).generate(PROMPT, SamplingParams(max_tokens=LENGTH, temperature=0))
    return output.text


def serve(folder: Path) -> str:
    """The text with which `quantkit serve` answers."""
    from starlette.testclient import TestClient

    from quantkit.server.app import ServerConfig, create_app

    session = LLM(folder, kv_memory=1 << 22).session
    with TestClient(create_app(session, ServerConfig("tiny", 4, 8, 60.0, 1 << 20, None))) as client:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}
        return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])


if __name__ == "__main__":
    text = {"generate": generate, "serve": serve}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"text": text, "modules": sorted(sys.modules)}))
