"""The usual metrics, compared with slow versions that spell the formulas out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.bench.measures import Limits, RequestRecord, Spread, figures, spread

TIMES = st.floats(0, 1e4, allow_nan=False)


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    """Any request: failed or completed, with tokens that showed no text, or several of them in a chunk."""
    arrival = draw(TIMES)
    waits = draw(st.lists(st.floats(1e-3, 100), min_size=0, max_size=8))
    chunks = [arrival + sum(waits[: i + 1]) for i in range(len(waits))]
    end = (chunks[-1] if chunks else arrival) + draw(st.floats(1e-3, 10))
    error = draw(st.sampled_from([None, None, None, "status 429: busy", "ReadError"]))
    return RequestRecord(arrival, end, tuple(chunks), draw(st.integers(1, 99)), draw(st.integers(1, 20)), error)


def _percentile(values: list[float], share: float) -> float:
    """The quantile `share` of the values, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    return Spread(math.fsum(values) / len(values), _percentile(values, 0.5), _percentile(values, 0.99))


def _same(found: Spread | None, wanted: Spread | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        for part in ("mean", "median", "p99"):
            # The order of the sums differs: a few dozen float64 numbers below 1e5.
            assert getattr(found, part) == pytest.approx(getattr(wanted, part), rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_spread(values: list[float]) -> None:
    found, wanted = spread(values), _spread(values)
    assert (found is None) == (not values)
    if found is not None and wanted is not None:
        scale = max(map(abs, values))
        for part in ("mean", "median", "p99"):
            assert getattr(found, part) == pytest.approx(getattr(wanted, part), abs=1e-12 * scale)


def _latencies(done: list[RequestRecord]) -> dict[str, list[float]]:
    """All TTFT, ITL, TPOT and E2E values of completed requests."""
    found: dict[str, list[float]] = {"ttft": [], "itl": [], "tpot": [], "e2e": []}
    for record in done:
        first = record.chunks[0] if record.chunks else record.end
        found["ttft"].append(first - record.arrival)
        found["e2e"].append(record.end - record.arrival)
        if record.output_tokens > 1:
            found["tpot"].append((record.end - first) / (record.output_tokens - 1))
        for i in range(1, len(record.chunks)):
            found["itl"].append(record.chunks[i] - record.chunks[i - 1])
    return found


@given(st.lists(records(), min_size=1, max_size=20), st.none() | st.floats(0, 200), st.none() | st.floats(0, 50))
def test_figures(run: list[RequestRecord], ttft_limit: float | None, tpot_limit: float | None) -> None:
    found = figures(run, Limits(ttft_limit, tpot_limit))
    done = [record for record in run if record.error is None]
    failed = [record for record in run if record.error is not None]
    wall = max(record.end for record in run) - min(record.arrival for record in run)
    assert (found.requests, found.completed) == (len(run), len(done))
    assert sum(found.errors.values()) == len(failed)
    assert all(found.errors[text] == sum(record.error == text for record in failed) for text in found.errors)
    assert found.wall_seconds == wall
    assert found.prompt_tokens == sum(record.prompt_tokens for record in done)
    assert found.system_tps == pytest.approx(sum(record.output_tokens for record in done) / wall)
    assert found.rps == pytest.approx(len(done) / wall)
    wanted = _latencies(done)
    for name, values in wanted.items():
        _same(getattr(found, name), _spread(values))
    per_token = _spread(wanted["tpot"])
    assert (found.user_tps is None) == (per_token is None or 0 in (per_token.mean, per_token.median, per_token.p99))
    if found.user_tps is not None and found.tpot is not None:
        assert found.user_tps.median == pytest.approx(1 / found.tpot.median)
        assert found.user_tps.p99 == pytest.approx(1 / found.tpot.p99)
    if ttft_limit is None and tpot_limit is None:
        assert found.goodput is None
        return
    good = 0
    for record in done:
        in_time = ttft_limit is None or record.ttft <= ttft_limit
        if tpot_limit is not None and record.output_tokens > 1:
            in_time = in_time and (record.end - record.arrival - record.ttft) / (record.output_tokens - 1) <= tpot_limit
        good += in_time
    assert found.goodput == pytest.approx(good / wall)


def test_one_request_by_hand() -> None:
    """Five tokens in four chunks: two of them arrived together."""
    record = RequestRecord(10.0, 12.0, (11.0, 11.2, 11.8, 12.0), 7, 5)
    assert record.ttft == 1.0
    assert record.e2e == 2.0
    assert record.tpot == 0.25
    assert record.itl == pytest.approx([0.2, 0.6, 0.2])
    found = figures([record], Limits(ttft=1.0, tpot=0.25))
    assert (found.system_tps, found.rps, found.goodput) == (2.5, 0.5, 0.5)
    assert found.user_tps == Spread(4.0, 4.0, 4.0)
    assert figures([record], Limits(tpot=0.2)).goodput == 0


def test_a_text_that_came_at_once_has_no_speed() -> None:
    """All tokens arrive in the last chunk: the time per token is 0, and nothing is divided by it."""
    found = figures([RequestRecord(0.0, 1.0, (1.0,), 1, 4)], Limits())
    assert found.tpot == Spread(0, 0, 0)
    assert found.user_tps is None


def test_nothing_was_completed() -> None:
    found = figures([RequestRecord(0.0, 1.0, (), error="ConnectError")], Limits(ttft=1.0))
    assert (found.completed, found.system_tps, found.rps, found.goodput) == (0, 0, 0, 0)
    assert found.ttft is found.itl is found.tpot is found.e2e is found.user_tps is None
    assert found.errors == {"ConnectError": 1}
