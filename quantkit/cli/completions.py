"""The requests of `quantkit generate` and their outputs.

Finished outputs can be shown and written at any time: a failed request or Ctrl-C does not lose the texts of the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import typer

from quantkit.data.prompts import LocatedPrompt
from quantkit.errors import QuantkitError
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.output import FinishReason, Output, merge_outputs
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.engine import Engine


class Completions:
    """Requests in an engine, and the output of each of their samples."""

    def __init__(self, engine: Engine, prompts: Sequence[LocatedPrompt], requests: Sequence[Request]) -> None:
        """
        Args:
            engine: an engine without other work.
            prompts: the prompts of the requests, in the same order.
            requests: what to add to the engine.

        Raises:
            RequestError: a request can never be served. Nothing runs then.
        """
        self._engine = engine
        self._prompts: dict[int, LocatedPrompt] = {}
        self._parts: dict[tuple[int, int], list[Output]] = {}
        for prompt, request in zip(prompts, requests, strict=True):
            with prompt.located_errors():
                self._prompts[engine.add(request)] = prompt

    def run(self, watch: Callable[[Output], None]) -> None:
        """Run all requests to their end, even if some fail. `watch` is called with every piece of output as it is generated.

        Raises:
            Exception: a step failed for a reason other than its requests.
        """
        while self._engine.has_work:
            for output in self._engine.step():
                if output.error is not None and not isinstance(output.error, QuantkitError):
                    raise output.error
                self._parts.setdefault((output.request_id, output.index), []).append(output)
                watch(output)

    @property
    def ended(self) -> list[Output]:
        """Complete outputs of the finished samples, in the order of the prompts."""
        return [merge_outputs(parts) for _, parts in sorted(self._parts.items()) if parts[-1].finish_reason is not None]

    @property
    def failures(self) -> list[str]:
        """One line for each failed request."""
        errors = {output.request_id: output.error for output in self.ended if output.error is not None}
        return [self._prompts[number].with_location(error) for number, error in errors.items()]

    def show(self) -> None:
        """Print the finished samples, each after a line with its number and its prompt."""
        outputs = self.ended
        several = any(output.index for output in outputs)
        for output in outputs:
            text = self._prompts[output.request_id].prompt
            sample = f", sample {output.index + 1}" if several else ""
            typer.echo(f"--- {output.request_id + 1}{sample}: {text if isinstance(text, str) else text[-1]['content']}")
            typer.echo(output.text)

    def to_json(self) -> list[dict[str, Any]]:
        """The finished samples as plain data."""
        return [_completion(output) for output in self.ended]


def cut_short(outputs: Sequence[Output], model: Model, max_tokens: int) -> int:
    """Number of texts that ended before `max_tokens` because KV memory holds less than the model's context."""
    if model.max_model_len == model.context:
        return 0
    return sum(output.finish_reason is FinishReason.LENGTH and output.usage.generated < max_tokens for output in outputs)


def _completion(output: Output) -> dict[str, Any]:
    return {
        "request": output.request_id,
        "sample": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": None if output.finish_reason is None else output.finish_reason.value,
        "stop": output.stop,
        "error": None if output.error is None else str(output.error),
        "usage": output.usage._asdict(),
        "timing": output.timing._asdict(),
        "logprobs": [entry._asdict() for entry in output.logprobs],
    }
