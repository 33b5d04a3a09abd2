"""Engines in which a model drafts for itself."""

from pathlib import Path

import torch

from helpers.greedy import GREEDY, PROMPTS
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model
from quantkit.runtime.speculative.metrics import SpeculationStats
from quantkit.runtime.speculative.self_draft import SelfDraft

CPU = torch.device("cpu")


def opened(folder: Path, tokens: int = 4096) -> ModelRunner:
    per_token = 3 * 2 * 2 * 16 * 4
    return open_model(folder, CPU, CacheOptions(memory=tokens * per_token, block_size=4, dtype=torch.float32))


def engine(model: ModelRunner, activation_bits: int | None, config: EngineConfig) -> Engine:
    proposer = None if activation_bits is None else SelfDraft(model.quantized_draft(activation_bits), model.block_size)
    return Engine(model, config, proposer=proposer)


def generated(running: Engine, params: SamplingParams = GREEDY) -> list[list[int]]:
    """The outputs for all prompts, in an order in which a small cache preempts some of them."""
    outputs = running.generate([Request(PROMPTS[index], params) for index in (3, 2, 4, 1, 0, 5)])
    running.check()
    return [output.token_ids for output in outputs]


def speculation(running: Engine) -> SpeculationStats:
    found = running.stats.speculation
    assert found is not None
    return found
