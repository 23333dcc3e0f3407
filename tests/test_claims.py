"""The table of claims says what the evidence says, and nothing where there is none."""

from __future__ import annotations

import pandas as pd
import pytest

from msunet_core.errors import StudyError
from msunet_core.study.claims import (
    NOT_REPRODUCED,
    NOT_TESTABLE,
    RECORD_LOSS,
    REPRODUCED,
    ablation_claims,
    claims,
    load_shipped,
    record_claim,
    wilson,
)


def ablations(folder, *rows):
    columns = ["choice", "value", "n", "mean", "sd", "low", "high", "p", "resolved"]
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_csv(folder / "evidence.csv", index=False)
    return {claim.published: claim for claim in ablation_claims(folder)}


def row(choice, value, mean, low, high):
    return (choice, value, 6, mean, 0.5, low, high, 0.03, low * high > 0)


def test_the_interval_of_a_share_is_wilsons():
    # 5 of 10: 23.66 % to 76.34 %, as tabulated.
    assert wilson(0.5, 10) == pytest.approx((23.66, 76.34), abs=0.01)
    low, high = wilson(1.0, 10_000)
    assert 99.9 < low < 100 and high == pytest.approx(100)


def test_a_difference_that_the_interval_resolves_decides(tmp_path):
    found = ablations(
        tmp_path,
        row("weights", "binary", -2.0, -2.5, -1.5),  # the baseline is ternary
        row("consistency", "off", 1.0, 0.5, 1.5),  # without it the network is better
        row("opt level", "O0", 0.1, -0.2, 0.4),
        row("squeeze-excitation sparsity", "none", 0.5, -0.5, 1.6),
    )
    assert [claim.verdict for claim in found.values()] == [
        REPRODUCED,
        NOT_REPRODUCED,
        REPRODUCED,  # O3 is at most 0.4 points below O0
        NOT_TESTABLE,  # its loss may be more than a point or less
    ]
    assert found["ternary weights beat binary ones"].result == "+2.00 points (+1.50 to +2.50)"
    assert found["ternary weights beat binary ones"].n == "6 pairs"
    assert "do not resolve" in found["squeeze-excitation survives 90 % sparsity"].reason


def test_a_row_of_the_better_value_counts_as_it_stands(tmp_path):
    found = ablations(tmp_path, row("consistency", "as released", 0.8, 0.1, 1.5))
    assert found["the consistency term helps"].verdict == REPRODUCED
    assert found["the consistency term helps"].result.startswith("+0.80")


def test_without_ablations_nothing_is_claimed(tmp_path):
    found = list(ablation_claims(tmp_path / "none"))
    assert {claim.verdict for claim in found} == {NOT_TESTABLE}
    assert {claim.result for claim in found} == {""} and all(claim.reason for claim in found)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert {claim.verdict for claim in ablation_claims(tmp_path)} == {NOT_TESTABLE}


@pytest.mark.parametrize(("off", "verdict"), [(0.03, REPRODUCED), (-0.03, REPRODUCED), (0.2, NOT_REPRODUCED)])
def test_the_record_is_met_where_every_epoch_is_close(tmp_path, off, verdict):
    path = tmp_path / "history.csv"
    losses = [RECORD_LOSS[0], RECORD_LOSS[1] + off, RECORD_LOSS[2]]
    pd.DataFrame({"epoch": [0, 1, 2], "train_loss": losses}).to_csv(path, index=False)
    claim = record_claim(path)
    assert claim.verdict == verdict and claim.n == "3 epochs"
    assert f"{abs(off):.3f} (epoch 1)" in claim.result


def test_a_history_that_is_none_is_refused(tmp_path):
    (tmp_path / "history.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StudyError, match="is no history"):
        record_claim(tmp_path / "history.csv")


@pytest.mark.slow
def test_every_published_claim_has_a_row_and_the_shipped_network_is_what_it_is():
    shipped = load_shipped()
    rows = claims(shipped=shipped)
    published = " | ".join(row.published for row in rows)
    for words in (
        "80.13 %",
        "0.09853 M",
        "85.27 M",
        "0.01083",
        "ternary",
        "consistency",
        "O3 costs",
        "36.5 M",
        "10.49 G",
    ):
        assert words in published, words
    by = {row.published: row for row in rows}
    for reproduced in (
        "0.09853 M parameters",
        "target sparsity after 100 epochs",
        "WideResNet-28-10: 36.5 M parameters",
    ):
        assert by[reproduced].verdict == REPRODUCED, by[reproduced]
    top1, low, high = shipped.top1
    accuracy = by["80.13 % top-1 at O3"]
    assert f"{top1:.2f} %" in accuracy.result and low < top1 < high
    assert (accuracy.verdict == REPRODUCED) == (high >= 80.13)


@pytest.mark.slow
def test_a_checkout_without_evidence_says_what_it_can_count_and_no_more(tmp_path):
    verdicts = {row.published: row.verdict for row in claims(tmp_path)}
    assert verdicts["0.09853 M parameters"] == REPRODUCED
    assert verdicts["80.13 % top-1 at O3"] == verdicts["score 0.01083"] == NOT_TESTABLE
