"""The parts of each method, the shifted inputs that asymmetric calibration compensates, and the reported fallback to RTN."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from helpers.method_samples import SCHEMES, activations, assert_sound, loss, second_moment, weights
from quantkit.errors import NumericsError
from quantkit.methods import METHODS, asymmetric_calibration
from quantkit.methods.asymmetric_calibration import asymmetric_targets
from quantkit.methods.base import InputStats, SolverSettings
from quantkit.methods.hessian import HessianAccumulator
from quantkit.methods.hessian_factor import factorize
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme
from quantkit.methods.solve import solve
from quantkit.models.families import Fold, MatrixGroup
from quantkit.quantization.block import BlockQuantizer
from quantkit.quantization.calibration import ActivationStream, LockstepForward
from quantkit.quantization.report import MatrixReport

SETTINGS = SolverSettings(
    METHODS["gptq"],
    act_order=True,
    damping=0.01,
    asymmetric_calibration=0.5,
    coordinate_descent_passes=1,
    dtype=torch.bfloat16,
)
INDEFINITE = torch.eye(32) - 2 * torch.ones(32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_answer_can_be_stored(scheme: Scheme, method: str, dtype: torch.dtype) -> None:
    settings = replace(SETTINGS, method=METHODS[method], dtype=dtype)
    weight = weights(6, 96)
    quantized = solve(weight, InputStats(second_moment(activations(96)), None, settings), scheme, settings)
    assert_sound(quantized, 6, 96, dtype)
    assert quantized.scheme == scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_method_loses_less_than_the_one_before(scheme: Scheme) -> None:
    hessian, weight = second_moment(activations(96)), weights(32, 96)
    losses = []
    for settings in (replace(SETTINGS, method=METHODS[method]) for method in ("rtn", "awq", "gptq")):
        losses.append(loss(weight, solve(weight, InputStats(hessian, None, settings), scheme, settings), hessian))
    # Clipping is chosen per group, so over the whole matrix it may be slightly worse; compensation never is.
    assert losses[1] < 1.1 * losses[0]
    assert losses[2] < 0.8 * min(losses[:2])


def test_without_inputs_there_is_only_rounding() -> None:
    weight, scheme = weights(6, 96), Scheme(4, 32, True)
    for method in METHODS:
        quantized = solve(weight, None, scheme, replace(SETTINGS, method=METHODS[method]))
        assert torch.equal(quantized.codes, rtn(weight, scheme, torch.bfloat16).codes)


def _paired(tokens: int = 300) -> tuple[Tensor, Tensor, HessianAccumulator]:
    """Inputs, what they were in the original model, and their moments; a second batch of the same size has no counterpart."""
    reference = activations(48, tokens)
    x = reference + 0.1 * activations(48, tokens, seed=5)
    sums = HessianAccumulator(48, torch.device("cpu"))
    sums.add(x, reference)
    sums.add(activations(48, tokens, seed=9))
    return x, reference, sums


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_matched_solves_the_least_squares_problem(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # A large ridge, so that the test notices if it is missing or applied to W* instead of the change W* - W.
    monkeypatch.setattr(asymmetric_calibration, "RIDGE", 0.1)
    x, reference, sums = _paired()
    weight, drift = weights(7, 48).double(), sums.drift()
    assert drift is not None
    # min over C of ||X C^T - (X_ref - X) W^T||^2 + T * ridge * ||C||^2, as one ordinary least-squares problem.
    ridge = 0.1 * float(x.double().square().mean(0).mean()) * len(x)
    system = torch.cat([x.double(), ridge**0.5 * torch.eye(48, dtype=torch.float64)])
    wanted = torch.cat([(reference - x).double() @ weight.T, torch.zeros(48, 7, dtype=torch.float64)])
    change = torch.linalg.lstsq(system, wanted).solution.T
    # The ridge bounds the condition number near 1e3; float32 moments then give the solution to about 1e-4 of its size.
    (found,) = asymmetric_targets([weight.float()], drift, strength)
    torch.testing.assert_close(found.double() - weight, strength * change, rtol=0, atol=2e-4 * float(change.abs().max()))


def test_matching_brings_the_outputs_back() -> None:
    x, reference, sums = _paired()
    weight, drift = weights(7, 48), sums.drift()
    assert drift is not None
    wanted = reference @ weight.T
    before = float((x @ weight.T - wanted).square().sum())
    (found,) = asymmetric_targets([weight], drift, 1.0)
    assert float((x @ found.T - wanted).square().sum()) < 0.9 * before
    (found,) = asymmetric_targets([weight], drift, 0.0)
    assert torch.equal(found, weight)


def test_gptq_aims_at_the_matched_weight() -> None:
    _, _, sums = _paired()
    weight, scheme = weights(7, 48), Scheme(4, 16, True)
    stats = InputStats(sums.mean(), drift := sums.drift(), SETTINGS)
    assert drift is not None
    stacked = [weight, weights(5, 48)]
    targets = stats.take_targets(stacked)
    assert stats.drift is None
    assert all(map(torch.equal, targets, asymmetric_targets(stacked, drift, SETTINGS.asymmetric_calibration)))
    target, quantized = targets[0], solve(targets[0], stats, scheme, SETTINGS)
    assert loss(target, quantized, stats.hessian) < loss(weight, quantized, stats.hessian)


def test_a_hopeless_hessian_falls_back_to_rounding() -> None:
    weight, scheme = weights(6, 32), Scheme(4, 16, False)
    assert factorize(INDEFINITE, 0.01, act_order=True) is None
    stats = InputStats(INDEFINITE, None, SETTINGS)
    assert stats.factor is None
    quantized = solve(weight, stats, scheme, SETTINGS)
    assert torch.equal(quantized.dequantize(), rtn(weight, scheme, torch.bfloat16).dequantize())


class _Block(nn.Module):
    """A norm and two matrices that read its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(32), nn.Linear(32, 8, bias=False), nn.Linear(32, 24, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + torch.cat([self.first(normed), self.second(normed)], -1)


GROUPS = (MatrixGroup(("first", "second"), Fold("norm")),)


def _run_job(method: str, hidden: Tensor) -> tuple[BlockQuantizer, list[MatrixReport]]:
    torch.manual_seed(0)
    reports: list[MatrixReport] = []
    schemes = {"first": Scheme(4, 16, True), "second": Scheme(3, 16, True)}
    settings = replace(SETTINGS, method=METHODS[method], asymmetric_calibration=0.0)
    block = _Block()
    job = BlockQuantizer(block, "layers.0.", schemes, PreTrainedConfig(), settings, reports.append)
    job.written.unquantized["norm.weight"] = block.norm.weight.detach()
    streams = [ActivationStream([hidden])]
    with torch.no_grad(), LockstepForward(block, GROUPS, streams, lambda _rows: {}, keep_paused=True) as lockstep:
        job.quantize(GROUPS, lockstep, streams)
        list(lockstep.outputs())
    return job, reports


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_the_job_reports_its_fall_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HessianAccumulator, "mean", lambda _self: INDEFINITE)
    job, reports = _run_job(method, torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)))
    assert [report.name for report in reports] == ["layers.0.first", "layers.0.second"]
    for report in reports:
        assert report.method == "rtn"
        assert "fell back to rtn" in report.note
        assert report.damping is None
    assert set(job.written.quantized) == {"first", "second"}


def test_the_job_reports_what_it_did() -> None:
    hidden = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 32)
    for method in ("awq", "gptq", "awq+gptq"):
        _, reports = _run_job(method, hidden)
        assert [(report.method, report.note) for report in reports] == [(method, "")] * 2
        assert [report.scheme for report in reports] == ["4-bit g16 sym", "3-bit g16 sym"]
        assert all((report.damping == 0.01) == ("gptq" in method) for report in reports)
        assert all((report.scale_ratio is not None) == method.startswith("awq") for report in reports)
        assert all(0 < report.output_error < 0.1 for report in reports)
        assert all(0 < report.saturation < 1 for report in reports)
        # One more bit gains about 6 dB; the two differ by one bit and by their weights.
        assert reports[0].snr_db > reports[1].snr_db + 3


def test_an_input_that_is_not_finite_is_named() -> None:
    hidden = torch.ones(1, 16, 32)
    hidden[0, 3, 7] = torch.inf
    with pytest.raises(NumericsError, match=r"layers\.0\.first: its calibration inputs hold NaN or Inf"):
        _run_job("gptq", hidden)


def test_moments_hold_no_factor_that_nobody_needs() -> None:
    for method in ("rtn", "awq"):
        assert InputStats(torch.eye(4), None, replace(SETTINGS, method=METHODS[method])).factor is None


def test_only_gptq_aims_beside_the_weight() -> None:
    _, _, sums = _paired()
    weight = weights(7, 48)
    (target,) = InputStats(sums.mean(), sums.drift(), replace(SETTINGS, method=METHODS["awq"])).take_targets([weight])
    assert target is weight


def test_coarse_grids_alone_are_swept_unless_the_recipe_says_so() -> None:
    hessian, weight = second_moment(activations(96)), weights(8, 96)
    for bits, passes in ((2, 1), (3, 1), (4, 0), (8, 0)):
        scheme, as_said = Scheme(bits, 32, True), replace(SETTINGS, coordinate_descent_passes=passes)
        by_itself = replace(SETTINGS, coordinate_descent_passes=None)
        found, wanted = (solve(weight, InputStats(hessian, None, each), scheme, each) for each in (by_itself, as_said))
        assert torch.equal(found.dequantize(), wanted.dequantize())
        other = replace(SETTINGS, coordinate_descent_passes=1 - passes)
        differs = solve(weight, InputStats(hessian, None, other), scheme, other)
        assert not torch.equal(differs.dequantize(), wanted.dequantize())
