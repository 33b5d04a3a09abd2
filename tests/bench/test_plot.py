"""The plot shows the numbers of the report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='needs pip install "quantkit-llm[bench]"')

from quantkit.bench.client import Workload
from quantkit.bench.measures import Limits, RequestRecord, figures
from quantkit.bench.plot import draw, plot
from quantkit.bench.run import BenchReport, Point
from quantkit.errors import ResourceError


def _report() -> BenchReport:
    """Three loads, each slower than the one before; under the last nothing was completed."""
    points = []
    for level in (1, 2, 3):
        records = [RequestRecord(0.0, 1.0 * level + i, (0.5 * level + i,), 4, 6) for i in range(level)]
        if level == 3:
            records = [replace(record, error="busy") for record in records]
        points.append(Point(f"{level} concurrent", level, figures(records, Limits())))
    return BenchReport("http://stub", "stub", Workload(), Limits(ttft=0.7), points)


def test_lines() -> None:
    report = _report()
    left, right = draw(report).axes
    for axes, name in ((left, "ttft"), (right, "tpot")):
        median, p99, *limit = axes.get_lines()
        shown = [point.figures for point in report.points[:2]]
        assert list(np.asarray(median.get_xdata())) == list(np.asarray(p99.get_xdata())) == [each.system_tps for each in shown]
        assert list(np.asarray(median.get_ydata())) == pytest.approx([1000 * getattr(each, name).median for each in shown])
        assert list(np.asarray(p99.get_ydata())) == pytest.approx([1000 * getattr(each, name).p99 for each in shown])
        assert len(limit) == (name == "ttft")
        assert [text.get_text() for text in axes.texts] == ["1", "2"]


def test_a_png(tmp_path: Path) -> None:
    plot(_report(), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ResourceError, match="cannot be written"):
        plot(_report(), tmp_path / "nowhere" / "sweep.png")
