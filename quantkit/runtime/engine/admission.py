"""Checks whether a request can ever be served. They run when it arrives, before anything is allocated for it."""

from quantkit.errors import RequestError
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.request import Request
from quantkit.runtime.kv_cache.eviction import UNBOUNDED


def kv_token_limit(model: Model, capacity: int) -> int | None:
    """Tokens of one sequence that KV memory holds; None if eviction keeps every sequence below that.

    `capacity`: largest number of tokens that a sequence holds.
    """
    held = model.num_blocks * model.block_size
    return None if capacity <= held else held


def length_limit(request: Request, model: Model, capacity: int = UNBOUNDED) -> int:
    """The length in tokens, prompt and output together, at which a sequence of the request ends.

    The last token is output only: it takes no room in the KV cache.

    Args:
        request: the new request.
        model: the model that would serve it.
        capacity: largest number of tokens that a sequence holds.
    """
    held = kv_token_limit(model, capacity)
    max_tokens = request.params.max_tokens
    if max_tokens is None:
        return model.max_model_len if held is None else min(model.max_model_len, held + 1)
    return min(model.max_model_len, len(request.prompt) + max_tokens)


def check_request(request: Request, model: Model, max_batch: int, has_text: bool, capacity: int = UNBOUNDED) -> None:
    """Refuse a request that this model cannot serve.

    Args:
        request: the new request.
        model: the model that would serve it.
        max_batch: largest number of running sequences.
        has_text: whether the engine can turn tokens into text.
        capacity: largest number of tokens that a sequence holds.

    Raises:
        RequestError: the prompt is empty, or longer than the context or KV memory; a token is not in the vocabulary; there
            are more samples than can run; or stop strings were given without a tokenizer.
    """
    prompt, params, vocab = request.prompt, request.params, model.vocab_size
    if not prompt:
        raise RequestError("the prompt has no tokens; give at least one")
    if min(prompt) < 0 or max(prompt) >= vocab:
        wrong = next(token for token in prompt if not 0 <= token < vocab)
        raise RequestError(f"token {wrong} of the prompt is not in the vocabulary of {vocab:,}; use this model's tokenizer")
    if len(prompt) >= model.max_model_len:
        found = f"the prompt has {len(prompt):,} tokens"
        limit = f"{model.max_model_len:,} tokens, prompt and output together"
        if model.max_model_len < model.context:
            raise RequestError(f"{found} and KV memory holds {limit}; raise --kv-memory or shorten the prompt")
        raise RequestError(f"{found} and the context is {limit}; shorten the prompt")
    held = kv_token_limit(model, capacity)
    needed = max(len(prompt), length_limit(request, model, capacity) - 1)
    if held is not None and needed > held:
        raise RequestError(
            f"KV memory holds {held:,} tokens, this request needs up to {needed:,}; lower max_tokens or give more memory"
        )
    if params.n > max_batch:
        raise RequestError(f"n is {params.n} and only {max_batch} sequences run at a time; lower n")
    if any(not 0 <= token < vocab for token in params.stop_token_ids):
        raise RequestError(f"stop_token_ids has tokens outside of the vocabulary of {vocab:,}; use this model's tokenizer")
    if params.stop and not has_text:
        raise RequestError("stop strings need a tokenizer and this engine has none; use stop_token_ids")
