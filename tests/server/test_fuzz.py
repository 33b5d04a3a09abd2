"""Valid and invalid requests, generated from the OpenAPI schema: never a status 5xx, always a body in the documented form.

By default a few hundred requests are sent. QUANTKIT_FUZZ=10000 in the environment sends 10,000, which takes about five
minutes, most of it to generate the requests.
"""

import os
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from helpers.live_server import serving, tiny_folder
from quantkit.server.app import ServerConfig

REQUESTS = int(os.environ.get("QUANTKIT_FUZZ", "240"))
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tiny_folder(tmp_path_factory.mktemp("fuzzed")), ServerConfig("tiny", 8)) as (address, _):
        yield address


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_no_request_breaks_it(url: str, path: str, mode: schemathesis.GenerationMode) -> None:
    described = schemathesis.openapi.from_dict(httpx.get(url + "/openapi.json").json())
    cases = described[path]["POST"].as_strategy(generation_mode=mode)
    seen: set[int] = set()

    @given(case=cases)
    @settings(
        max_examples=REQUESTS // (2 * len(PATHS)),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 8)  # longer texts would test nothing more
        reply = case.call(base_url=url)
        seen.add(reply.status_code)
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]

    run()
    assert seen
