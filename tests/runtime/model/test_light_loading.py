"""A model that the native decoder runs needs none of transformers' modelling code, and gives the same text as with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny
from helpers.light import LENGTH, PROMPT
from quantkit import LLM, SamplingParams

#: The definitions of models, what all of them import, and large libraries that come with it. Tables of names (`models.auto`)
#: and formulas of ropes are small.
HEAVY = re.compile(
    r"transformers\.(modeling_utils|core_model_loading|activations|models\.(?!auto\.)\w+\.(modeling|configuration)_(?!encoder)\w+)$"
    r"|(torch\._dynamo|torch\.distributed\.tensor|triton|sympy|scipy|pandas|pyarrow|sklearn|datasets|accelerate)$"
)


@pytest.mark.parametrize(
    ("verb", "family"),
    [("generate", "llama"), ("generate", "qwen2"), ("generate", "gemma3_text"), ("generate", "phi3"), ("serve", "llama")],
)
def test_text_without_modelling_code(tmp_path: Path, verb: str, family: str) -> None:
    folder = tiny.make_model(tmp_path / "model", family)
    command = [sys.executable, "-m", "helpers.light", verb, str(folder)]
    path = os.pathsep.join([str(Path(tiny.__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [name for name in found["modules"] if HEAVY.match(name)] == []
    llm = LLM(folder, kv_memory=1 << 22)
    llm.session.model.backends = llm.session.model.backends[-1:]  # through transformers' definition
    (eager,) = llm.generate(PROMPT, SamplingParams(max_tokens=LENGTH, temperature=0))
    assert found["text"] == eager.text
    assert any(HEAVY.match(name) for name in sys.modules)
