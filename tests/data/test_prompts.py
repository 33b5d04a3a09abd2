"""Files of prompts: which lines are prompts, the position of each, and what is refused."""

import json
from pathlib import Path

import pytest

from quantkit.data.prompts import LocatedPrompt, read_prompts
from quantkit.errors import RequestError

#: Line breaks for str.splitlines, which JSON and prompts may hold as they are.
ODD = "a\u2028b\u0085c\x0bd\x0ce\x1cf\rg"


def test_only_newlines_end_lines_and_blank_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(f"\ufeff{ODD}\r\n\n  \nlast ".encode())
    assert read_prompts(path) == [LocatedPrompt(ODD, f"{path}, line 1"), LocatedPrompt("last ", f"{path}, line 4")]


def test_rows_of_json(tmp_path: Path) -> None:
    path, messages = tmp_path / "p.JSONL", [{"role": "user", "content": ODD}]
    rows = [{"prompt": ODD, "messages": None}, {"messages": messages, "id": 3}, {"prompt": messages}]
    path.write_bytes(b"\xef\xbb\xbf\n" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_prompts(path) == [
        LocatedPrompt(ODD, f"{path}, line 2"),
        LocatedPrompt(messages, f"{path}, line 3"),
        LocatedPrompt(messages, f"{path}, line 4"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", "[]", "p.json: .json files are not supported; name a .txt or .jsonl file of prompts"),
        ("p.txt", "\n \n", "p.txt: holds no prompt; write one per line"),
        ("p.jsonl", '\n\n{"prompt": 3}', 'line 3: has neither a "prompt" (text) nor "messages"'),
        ("p.jsonl", "\n[1]", "line 2: has neither"),
        ("p.jsonl", '{"prompt": "a", "messages": []}', 'line 1: has both a "prompt" and "messages"; leave one of them out'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}', "line 2: the prompt is empty; write one, or leave the line out"),
        ("p.jsonl", '{"messages": []}', "line 1: the prompt is empty"),
        ("p.jsonl", "[" * 100_000, "line 1: is not JSON"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError) as refusal:
        read_prompts(tmp_path / name)
    assert words in str(refusal.value)
