"""Text comes out in whole characters, for both kinds of tokenizers that split characters, with any text and any bytes."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantkit.runtime.core.detokenize import Decode, Detokenizer, StopStrings, TextStream

SAMPLE = ["the quick brown fox jumps over the lazy dog", "übergroße Fische schwimmen — 你好,世界", "naïve café 🙂🙂🚀"]


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen; all 256 bytes are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """BPE with byte tokens for unknown characters, and ▁ for spaces, as in SentencePiece models."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,.é"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {"byte-level": byte_level, "byte-fallback": byte_fallback}


#: Any text without surrogates. (A prompt that ends in U+FFFD looks like one that ends within a character.)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def _pieces(decode: Decode, prompt: list[int], tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(prompt=_TEXT.filter(lambda text: not text.endswith("\ufffd")), text=_TEXT)
@example(prompt="", text="🙂" * 20)
@example(prompt="Grüße 🚀🚀🚀", text="🙂, 你好 and some more text that is longer than a window")
def test_text_comes_out_whole_and_at_once(kind: str, prompt: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    decode = tokenizer.decode
    before, after = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    whole, start = decode(before + after), decode(before)
    pieces = _pieces(decode, before, after)
    assert start + "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)
        # Everything certain was shown: the text so far, up to an incomplete character.
        for i in range(len(after)):
            so_far = decode(before + after[: i + 1])
            if not so_far.endswith("\ufffd"):
                assert start + "".join(pieces[: i + 1]) == so_far


@settings(max_examples=150, deadline=None)
@given(prompt=st.binary(max_size=6), text=st.binary(max_size=60))
@example(prompt=b"a", text=b"\xff" * 40 + "é🙂".encode())
@example(prompt="é".encode()[:1], text="é".encode()[1:] + b" and on")
def test_bytes_that_are_no_text_come_out_as_a_decoder_shows_them(prompt: bytes, text: bytes) -> None:
    tokenizer = byte_level()
    byte_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2's table: printable bytes map to themselves, the others to U+0100 and up, in order.
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    rest = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    assert sorted(table.values()) == byte_of
    vocabulary = tokenizer.get_vocab()
    before, after = ([vocabulary[table[b]] for b in part] for part in (prompt, text))
    pieces = _pieces(tokenizer.decode, before, after)
    whole = (prompt + text).decode("utf-8", errors="replace")
    assert tokenizer.decode(before + after) == whole
    assert whole.endswith("".join(pieces))
    # Only an incomplete character at the end of the prompt may come out again, as part of the new text.
    shown = len(whole) - len("".join(pieces))
    assert prompt.decode("utf-8", errors="replace")[:shown] == whole[:shown]
    assert shown >= len(prompt.decode("utf-8", errors="replace")) - 3


def test_windows_stay_short() -> None:
    tokenizer = byte_level()
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    ids = tokenizer.encode(SAMPLE[0] * 20).ids
    assert "".join(_pieces(decode, ids[:5], ids[5:])) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:5])) :]
    assert max(lengths) <= 10
    assert len(lengths) <= len(ids) * 1.25


def _first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Reads character by character; returns (start, stop string) of the one complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=10),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
@example(pieces=["a", "a", "ab"], stops=["aab"], include=False)
@example(pieces=["abc"], stops=["abc", "b"], include=False)
def test_stops_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    text, finder, seen, shown = "".join(pieces), StopStrings(stops, include), "", ""
    wanted = _first_stop(text, stops)
    for piece in pieces:
        seen += piece
        shown += finder.push(piece)
        if finder.found is not None:
            break
        # Everything is shown except the longest suffix that may begin a stop string.
        held = [seen[i:] for i in range(len(seen) + 1) if any(stop.startswith(seen[i:]) for stop in stops)]
        assert shown + held[0] == seen
    if wanted is None:
        assert finder.found is None
        assert shown + finder.flush() == text
    else:
        start, stop = wanted
        assert finder.found == stop
        assert shown == text[: start + len(stop) * include]


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["</end>", "\n\n"], include=False)
    assert [finder.push(piece) for piece in ("text <", "/", "e", "x", "\n", "y</en", "d")] == [
        "text ", "", "", "</ex", "", "\ny", ""
    ]  # fmt: skip
    assert finder.flush() == "</end"


def test_a_stop_string_in_what_is_flushed_still_stops() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("ab🙂").ids
    stream = TextStream(tokenizer.decode, [], ["\ufffd"], include_stop=False)
    assert "".join(stream.push(token) for token in ids[:-1]) == "ab"
    assert stream.flush() == ""
    assert stream.stop == "\ufffd"
