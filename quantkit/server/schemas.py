"""Bodies of requests. An unknown field, or a value of a wrong type, is refused by name: nothing is ignored silently.

`null` means that the field is left out. Unsupported fields of OpenAI's API are accepted with the value that has no effect,
because client libraries send it. `user`, `metadata`, `safety_identifier` and `prompt_cache_key` are accepted with any value:
they are labels for the operator of an API and have no effect here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantkit.runtime.core.request import MAX_LOGPROBS, MAX_TEMPERATURE, SamplingParams

#: Fields of OpenAI's API that are not supported -> the values, besides null, that have no effect.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "name": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "refusal": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    "annotations": ([],),
}

#: Fields that go to `SamplingParams` under their own names.
_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """A JSON object in a request: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        listed = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in data.items():
            if name in UNSUPPORTED and name not in listed:
                # `1 == True` in Python, so types are compared too.
                neutral = any(type(value) is type(each) and value == each for each in UNSUPPORTED[name])
                if value is not None and not neutral:
                    raise ValueError(f"{name} is not supported by this server; leave it out")
            else:
                kept[name] = value
        return kept


class StreamOptions(Body):
    """Options of a stream: `include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = None


class TextFormat(Body):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A schema and its name."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Sampling(Body):
    """The fields that completions and chat completions share; most become `SamplingParams`."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1, description="0: all tokens.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # Far outside this range, penalised logits overflow float32.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def json_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that outputs must match; None: any text. `strict` has no effect: a schema is always enforced."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's sampling parameters.

        Raises:
            RequestError: a value is out of range.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        ids = tuple(self.stop_token_ids or ())
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, stop=stop, stop_token_ids=ids)


class CompletionBody(Sampling):
    """`POST /v1/completions`."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(cast(list[str | list[int]], self.prompt))

    def params(self) -> SamplingParams:
        """The engine's sampling parameters; `max_tokens` defaults to 16, as in OpenAI's API."""
        params = self.sampling(16 if self.max_tokens is None else self.max_tokens, self.logprobs)
        return replace(params, prompt_logprobs=self.logprobs if self.echo else None)


class TextPart(Body):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message. Text parts are joined by line breaks. The role `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """The message as chat templates expect it: role and text."""
        parts = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": parts}


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens disagree; give one of them")
        return self

    def params(self) -> SamplingParams:
        """The engine's sampling parameters; by default as many tokens as the context and KV memory hold."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(most, (self.top_logprobs or 0) if self.logprobs else None)


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or messages that go through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Token]
