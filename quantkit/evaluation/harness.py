"""quantkit's engine as a model of EleutherAI's lm-evaluation-harness (`lm_eval`).

Texts are tokenized like in the harness's own `hf` model, so that scores are comparable. All requests of a kind go to the
engine at once, sorted by falling length of their contexts, with equal contexts next to each other: the prefix cache then
computes a question once for all of its answers. One difference remains: the engine generates one token after every text that
it scores, so a text that fills the model's context is truncated two tokens earlier than by `hf`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantkit.errors import RequestError
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.session import Session

#: Names for the number of new tokens in tasks' `generation_kwargs`; the first one that is present counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Other entries, which go to the sampler unchanged.
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


class EngineLM(TemplateLM):
    """A session as a model of the harness.

    Attributes:
        max_length: most tokens that may precede a continuation.
        truncated: number of texts that were truncated at the front because they exceed the model's context.
    """

    def __init__(self, session: Session, advance: Callable[[str, int, int], None]) -> None:
        """
        Args:
            session: the model.
            advance: called with (kind of request, finished requests, requests).
        """
        super().__init__()
        self.tokenizer = session.tokenizer
        self.max_length = session.model.max_model_len - 2
        self.truncated = 0
        self._session, self._advance = session, advance

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return end if isinstance(end, int) else min(self._session.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without a context."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for the harness's caches."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text. Without a generation prompt, the text ends so that the model continues the last message."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with the tokenizer's special tokens, unless the text already begins with the prefix token."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows of the context's length; see the base class."""
        parts: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            disjoint = [make_disjoint_window(window) for window in windows]
            parts += [(None, context, continuation) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(parts))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated continuation of each context, up to a stop string; see the base class."""
        wanted = []
        for number, (context, options) in enumerate(request.args for request in requests):
            params = self._sampling(options, seed=number)
            assert params.max_tokens is not None
            room = self.max_length + 2 - params.max_tokens
            if room < 1:
                model = self._session.model
                holds = "the context is" if model.max_model_len == model.context else "free memory holds"
                found = f"the task asks for {params.max_tokens:,} new tokens and {holds} {model.max_model_len:,}"
                raise RequestError(f"{found}; choose another task")
            wanted.append(Request(self._truncate(self.tok_encode(context), room), params))
        return [output.text for output in self._run("generate_until", wanted)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """ln p(continuation | context) of token ids, and whether greedy decoding would produce the continuation."""
        wanted = []
        for _, context, continuation in requests:
            whole = self._truncate([*context, *continuation], self.max_length + 1)
            first = len(whole) - len(continuation)
            if first < 1:
                raise RequestError(
                    f"a continuation of {len(continuation):,} tokens does not fit {self.max_length:,} of context"
                )
            params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, prompt_logprobs_from=first)
            wanted.append(Request(whole, params))
        found = [output.prompt_logprobs for output in self._run("loglikelihood", wanted)]
        return [(sum(e.logprob for e in entries), all(e.top[0][0] == e.token for e in entries)) for entries in found]

    def _truncate(self, tokens: list[int], room: int) -> list[int]:
        """The last `room` tokens; counts truncations."""
        self.truncated += len(tokens) > room
        return tokens[-room:]

    def _sampling(self, options: Mapping[str, Any], seed: int) -> SamplingParams:
        """A task's `generation_kwargs` as sampling parameters. Stop strings that are special tokens become stop tokens,
        because the engine's texts do not contain special tokens.

        Raises:
            RequestError: an entry is not supported by the engine.
        """
        known = {*_LENGTHS, *_SAMPLING, "until", "do_sample", "temperature"}
        if unknown := sorted(set(options) - known):
            raise RequestError(f"the task's generation_kwargs hold {unknown[0]!r}, which quantkit's engine does not know")
        until = options.get("until") or []
        special = self.tokenizer.get_added_vocab()
        stops = dict.fromkeys([until] if isinstance(until, str) else until)
        sampled = options.get("do_sample", bool(options.get("temperature")))
        return SamplingParams(
            max_tokens=int(next((options[name] for name in _LENGTHS if options.get(name) is not None), 256)),
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            stop=tuple(each for each in stops if each and each not in special),
            stop_token_ids=tuple(special[each] for each in stops if each in special),
            seed=seed,
            **{name: options[name] for name in _SAMPLING if options.get(name) is not None},
        )

    def _run(self, kind: str, requests: list[Request]) -> list[Output]:
        """Run requests in the order that the module's docstring explains; returns outputs in the order of the requests."""

        def context(number: int) -> tuple[int, list[int]]:
            scored = requests[number].params
            tokens = list(requests[number].prompt)
            tokens = tokens[: scored.prompt_logprobs_from] if scored.prompt_logprobs is not None else tokens
            return -len(tokens), tokens

        order = sorted(range(len(requests)), key=context)
        over = 0
        self._advance(kind, 0, len(requests))

        def watch(output: Output) -> None:
            nonlocal over
            over += output.finish_reason is not None
            self._advance(kind, over, len(requests))

        outputs = self._session.engine.generate([requests[number] for number in order], watch)
        placed = dict(zip(order, outputs, strict=True))
        return [placed[number] for number in range(len(requests))]
