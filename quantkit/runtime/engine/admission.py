"""Whether a request can be served at all: decided when it arrives, before anything is allocated for it."""

from quantkit.errors import RequestError
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.request import Request
from quantkit.runtime.kv_cache.eviction import UNBOUNDED


def kv_token_limit(model: Model, capacity: int) -> int | None:
    """Longest text, without its last token, that KV memory serves; None where eviction keeps any text within it."""
    held = model.num_blocks * model.block_size
    return None if capacity <= held else held


def length_limit(request: Request, model: Model, capacity: int = UNBOUNDED) -> int:
    """Tokens, prompt and output together, at which a sequence of `request` ends.

    The last token is only ever output, so it takes no room in the KV cache.

    Args:
        request: what came in.
        model: what would serve it.
        capacity: tokens of a sequence that are held at most.
    """
    held, asked = kv_token_limit(model, capacity), request.params.max_tokens
    if asked is None:
        return model.max_model_len if held is None else min(model.max_model_len, held + 1)
    return min(model.max_model_len, len(request.prompt) + asked)


def check_request(request: Request, model: Model, max_batch: int, has_text: bool, capacity: int = UNBOUNDED) -> None:
    """Refuse what this model cannot serve.

    Args:
        request: what came in.
        model: what would serve it.
        max_batch: sequences that run at a time.
        has_text: whether tokens can be turned into text.
        capacity: tokens of a sequence that are held at most.

    Raises:
        RequestError: no prompt, or one that is longer than the context or than KV memory, a token that the model does not
            have, more samples than can run, stop strings without a tokenizer.
    """
    prompt, params, vocab = request.prompt, request.params, model.vocab_size
    if not prompt:
        raise RequestError("the prompt has no tokens; give at least one")
    if min(prompt) < 0 or max(prompt) >= vocab:
        wrong = next(token for token in prompt if not 0 <= token < vocab)
        raise RequestError(f"token {wrong} of the prompt is not in the vocabulary of {vocab:,}; use this model's tokenizer")
    if len(prompt) >= model.max_model_len:
        found, limit = f"the prompt has {len(prompt):,} tokens", f"{model.max_model_len:,} tokens, prompt and output together"
        if model.max_model_len < model.context:
            raise RequestError(f"{found} and KV memory holds {limit}; raise --kv-memory or shorten the prompt")
        raise RequestError(f"{found} and the context is {limit}; shorten the prompt")
    held, needed = kv_token_limit(model, capacity), max(len(prompt), length_limit(request, model, capacity) - 1)
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
