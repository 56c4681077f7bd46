"""How often a verdict is wrong, by simulation: held to what README and docs promise."""

import math

import pytest

from benchmarks.error_rates import LIMIT, Setting, verdicts

DRAWS = 400
AT_MOST = 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)  # 5 %, and the error of so few draws

CLUSTERED = [
    Setting(n, size, icc, base, mended)
    for n, size in [(100, 5), (160, 20)]
    for icc in (0.3, 0.6)
    for base, mended in [(0.9, 0.1), (0.6, 0.05)]
]
CLUSTERED += [Setting(400, 20, icc, 0.9, 0.1) for icc in (0.3, 0.6)]
ALONE = [Setting(100, 1, 0.3, 0.9, 0.1), Setting(100, 1, 0.6, 0.6, 0.05)]


GRADED = [Setting(n, size, 0.6, 0.9, graded=True) for n, size in [(160, 20), (400, 20), (200, 5)]]


@pytest.mark.parametrize("setting", [*ALONE, *CLUSTERED, *GRADED])
def test_a_loss_of_the_limit_fails_or_passes_one_time_in_twenty_at_the_most(setting):
    found = verdicts(setting, LIMIT, draws=DRAWS)
    assert found["fail"] <= AT_MOST * DRAWS
    assert found["pass"] <= AT_MOST * DRAWS


@pytest.mark.parametrize("setting", CLUSTERED)
def test_samples_taken_for_independent_would_be_wrong_more_often(setting):
    found = verdicts(setting, LIMIT, draws=150, clustered=False)
    assert found["fail"] > AT_MOST * 150
    assert found["pass"] > AT_MOST * 150


@pytest.mark.parametrize("size", [1, 5, 20])
def test_where_nothing_is_lost_nothing_fails_and_thrice_the_limit_never_passes(size):
    setting = Setting(400, size, 0.3, 0.9, 0.1)
    assert verdicts(setting, 0.0, draws=100)["fail"] == 0
    lost = verdicts(setting, 3 * LIMIT, draws=100)
    assert lost["pass"] == 0
    assert lost["fail"] >= 80
