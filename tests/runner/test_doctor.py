"""The examination of a machine: it finds nothing wrong here, says when something is, and counts bytes exactly."""

import pytest
import torch
from ming_univision.ming_core import cost
from ming_univision.ming_core.config import MingTokConfig, UniVisionConfig
from ming_univision.ming_core.experts import MixtureOfExperts
from ming_univision.ming_core.univision import UniVision
from ming_univision.runner import cli, doctor


@pytest.fixture(scope="module")
def published():
    return UniVision(UniVisionConfig(mingtok_config=MingTokConfig()), device="meta", dtype=torch.bfloat16)


@pytest.mark.slow
def test_the_quick_examination_finds_nothing_wrong_on_this_machine(capsys):
    assert cli.main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "All is well." in out and "WRONG" not in out
    for name in doctor.PRECISIONS:
        assert f"{name}, a picture" in out and f"{name}, results" in out


def test_results_that_are_off_are_wrong_and_the_exit_code_is_1(monkeypatch, capsys):
    for part in ("_products", "_built_in"):
        monkeypatch.setattr(doctor, part, lambda *_: None)
    monkeypatch.setattr(doctor, "PRECISIONS", {"fp32": doctor.PRECISIONS["fp32"]})
    assert doctor.main(quick=True) == 0
    forward = MixtureOfExperts.forward
    calls = []

    def drifting(self, *arguments):
        calls.append(None)
        return forward(self, *arguments) * (1 + 0.1 * len(calls))

    monkeypatch.setattr(MixtureOfExperts, "forward", drifting)
    assert doctor.main(quick=True) == 1
    assert "fp32, results: off by" in capsys.readouterr().out.split("Something is wrong:")[1]


def test_a_check_that_fails_is_wrong_and_does_not_keep_the_others_from_running(capsys):
    report = doctor.Report()
    report.attempt("first", lambda: 1 / 0)
    report.attempt("second", lambda: report.judge("second", True, "fine"))
    assert report.wrong == ["first: ZeroDivisionError: division by zero"]
    assert "ok, fine" in capsys.readouterr().out


def test_what_to_expect_is_told_for_every_part_with_its_multiple_of_the_floor(capsys):
    report = doctor.Report()
    doctor._expect(report, "fp32", doctor.layer_network(8), doctor.PRECISIONS["fp32"], speed=1e10)
    out = capsys.readouterr().out
    assert all(part in out for part in ("language model", "flow head", "semantic decoder", "s a picture", "of memory"))


def test_the_bytes_of_a_token_are_those_of_the_published_size(published):
    """In bf16, two guidance rows: 12 of 64 experts but for those that both choose; the flow head 16 times."""
    found = cost.token_bytes(published, rows=2, steps=16)
    experts = 28 * 64 * 3 * 2048 * 1408 * 2
    read = 1 - (1 - 6 / 64) ** 2
    assert found.language_model == cost.weight_bytes(published.language_model.model.layers) - experts * (1 - read)
    step = 12 * (3072 * 16384 + 16384 + 8192 * 3072 + 3072) + 2 * 32 * 3072 + 3072 + 32
    once = 12 * (3 * 3072 * 3072 + 3 * 3072) + 2 * 3072 * 3072 + 2 * 3072 + 3072 * 3072 + 3072
    assert found.flow_head == pytest.approx(2 * (16 * step + once + 2048 * 3072), rel=0.001)
    assert 36e9 < found.total < 39e9
    half = cost.token_bytes(published, rows=2, steps=8)
    assert half.flow_head < 0.55 * found.flow_head and half.language_model == found.language_model


def test_more_rows_read_more_experts_and_never_more_than_there_are(published):
    sizes = [cost.token_bytes(published, rows, 16).language_model for rows in (1, 2, 3, 1000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(cost.weight_bytes(published.language_model.model.layers))


def test_a_bandwidth_is_measured():
    assert 1e8 < cost.bandwidth(torch.device("cpu"), 1 << 22) < 1e13
