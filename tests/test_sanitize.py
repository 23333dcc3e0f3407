"""What `make test` lets pass when it compares a notebook's outputs with the stored ones, and what not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nbval.plugin import get_sanitize_patterns

PATTERNS = get_sanitize_patterns((Path(__file__).parent / "nbval_sanitize.cfg").read_text())


def sanitized(text: str) -> str:
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize(
    ("here", "elsewhere"),
    [
        ("<msunet at 0x7f957599b920>", "<msunet at 0x55aa12345678>"),
        ("trained in 41.3 s", "trained in 187 s"),
        ("wrote /home/a/study/runs/lab/train", "wrote /tmp/tmp.Xy/lab/train"),
        (
            "\rtrain 1/2, loss 4.61:  9%|#| 2/20 [00:01<00:09, 1.9step/s]\rx: 100%|#| 20/20 [00:10<00:00]\n",
            "\rtrain 1/2, loss 4.59:  50%|#| 9/20 [00:02<00:03, 4.1step/s]\n",
        ),
        ('<table id="T_1a2b3">', '<table id="T_ffff0">'),
    ],
)
def test_another_machine_passes(here, elsewhere):
    assert sanitized(here) == sanitized(elsewhere)


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ("params 98,530", "params 98,531"),
        ("score 0.01083", "score 0.01084"),
        ("top-1 80.13 %", "top-1 80.12 %"),
        ("v3 1/2 of 3/4", "v3 1/2 of 3/5"),
        ("trained in 41.3 s, top-1 12 %", "trained in 41.3 s, top-1 13 %"),
        ("<td>0.5</td><td>3 [1, 2]</td>", "<td>0.5</td><td>4 [1, 2]</td>"),
        ("(64, 32, 32, 3) | [0, 1]", "(64, 32, 32, 1) | [0, 1]"),
        ("blocks.2.0.conv_dw/weight", "blocks.2.1.conv_dw/weight"),
    ],
)
def test_a_changed_result_does_not(stored, now):
    assert sanitized(stored) != sanitized(now)
