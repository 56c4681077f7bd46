"""A compressed run against its baseline: what was lost, and whether that is acceptable."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.harness import stats
from pytest_kvguard.harness.records import Held, Run
from pytest_kvguard.harness.refusals import refusals

Verdict = Literal["pass", "fail", "inconclusive", "refused"]
"""pass and fail are proved: the whole interval of dP lies on one side of the limit."""

Mode = Literal["gate", "proved", "regression"]
"""What becomes of an inconclusive comparison.

``gate`` lets it hold if the observed dP is within the limit, ``proved`` never, ``regression``
always. In each of them a pass holds, and neither a fail nor a refused comparison does.
"""


@dataclass(frozen=True, repr=False)
class Comparison:
    """What compression did to one task.

    Worse is negative: for a task with ``higher_is_better=False`` the relative change of the
    score is turned round, so that dP = -0.10 is a score that has grown by a tenth.

    Raises InvalidArgument for a limit outside [0, 1), an impossible level or an unknown mode.
    Runs that cannot be compared make a refused comparison.
    """

    base: Run
    kept: Run
    max_drop: float  # the limit: how much may be lost, 0.10 is a tenth of the baseline's score
    level: float = 0.90  # of the interval, two-sided: each side is a test at 5 %
    mode: Mode = "gate"

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1:
            raise InvalidArgument(f"max_drop must be in [0, 1), got {self.max_drop!r}")
        if not 0 < self.level < 1:
            raise InvalidArgument(f"level must be in (0, 1), got {self.level!r}")
        if self.mode not in get_args(Mode):
            raise InvalidArgument(f"mode must be one of {get_args(Mode)}, got {self.mode!r}")

    @property
    def n(self) -> int:
        """How many samples the baseline answered."""
        return len(self.base.scores)

    @cached_property
    def clusters(self) -> int:
        """How many contexts those samples were read in; ``n`` where none share one."""
        return len(set(self.base.contexts))

    @cached_property
    def refusal(self) -> str | None:
        """Why these runs prove nothing whatever they score, or None."""
        return next(refusals(self.base, self.kept), None)

    @cached_property
    def weakness(self) -> str | None:
        """Why the baseline is too weak to lose anything, or None: a reason to skip, not to fail.

        None as well where there is a refusal, which comes first.
        """
        if self.refusal:
            return None
        # The fewer the better: then there is no chance level to stay clear of, only zero.
        chance = self.base.chance if self.base.higher_is_better else 0.0
        return stats.too_weak(self._base, chance) or self._limit_within_guessing(chance)

    def _limit_within_guessing(self, chance: float) -> str | None:
        allowed = self.base.mean * (1 - self.max_drop)
        if allowed > chance:
            return None
        return (
            f"guessing scores {chance:.3f}, which is within the limit of a baseline that scores "
            f"{self.base.mean:.3f}; use a stronger model, an easier task or a smaller limit"
        )

    @cached_property
    def dp(self) -> float:
        """Relative change of the mean score; -0.25 is a quarter lost.

        Raises Refused where there is a refusal or it is undefined: no assertion on it can hold.
        """
        self._must_be_comparable()
        assert self.observed is not None  # what leaves it undefined is refused
        return self.observed

    @cached_property
    def observed(self) -> float | None:
        """The dP of a report: also that of runs that prove nothing; None where undefined."""
        same = self.base.scores.keys() == self.kept.scores.keys()
        if not same or not self.base.scores or self.base.mean == 0:
            return None
        change = stats.relative_change(self._base, self._kept)
        return change if self.base.higher_is_better else -change

    @cached_property
    def interval(self) -> stats.Interval:
        """Lowest and highest dP that agree with the scores, at ``level``.

        Raises Refused where there is a refusal or dP is undefined.
        """
        self._must_be_comparable()
        assert self.observed_interval is not None  # what leaves it undefined is refused
        return self.observed_interval

    @cached_property
    def observed_interval(self) -> stats.Interval | None:
        """The interval of a report: None where there is a refusal or dP is undefined."""
        if self.refusal or self.observed is None:
            return None
        low, high = stats.interval(
            self._base,
            self._kept,
            level=self.level,
            clusters=self.base.contexts,
            higher_is_better=self.base.higher_is_better,
        )
        return (low, high) if self.base.higher_is_better else (-high, -low)

    @property
    def broke(self) -> tuple[str, ...]:
        """Samples that score worse than at baseline."""
        return self._changed(-1)

    @property
    def mended(self) -> tuple[str, ...]:
        """Samples that score better than at baseline."""
        return self._changed(+1)

    @property
    def held(self) -> Held | None:
        """The fraction of the prompt's tokens really held; None if not measured."""
        return self.kept.held

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the loss is proved to be within the limit, or past it, or neither."""
        if self.refusal or self.weakness:
            return "refused"
        low, high = self.interval
        if low > -self.max_drop:
            return "pass"
        return "fail" if high < -self.max_drop else "inconclusive"

    @property
    def holds(self) -> bool:
        """What CI acts on, as ``mode`` says."""
        if self.verdict != "inconclusive":
            return self.verdict == "pass"
        return self.mode == "regression" or (self.mode == "gate" and self.dp >= -self.max_drop)

    @cached_property
    def reason(self) -> str:
        """What the verdict rests on; empty for a pass with nothing odd about it."""
        if refused := self.refusal or self.weakness:
            return refused
        return "; ".join([*self._grounds(), *self._oddities()])

    @cached_property
    def samples_needed(self) -> int | None:
        """About how many samples would decide, to two digits; None if decided, or if none will."""
        if self.verdict != "inconclusive":
            return None
        limit = -self.max_drop if self.base.higher_is_better else self.max_drop
        needed = stats.samples_needed(
            self._base,
            self._kept,
            limit,
            clusters=self.base.contexts,
            higher_is_better=self.base.higher_is_better,
        )
        return None if needed is None else _two_digits(needed)

    def __repr__(self) -> str:
        if self.refusal or self.held is None or self.observed is None:
            return f"<{self.kept.label}: refused: {self.refusal or self.weakness}>"
        outcome = f"{self.verdict}: {self.weakness}" if self.weakness else self.verdict
        return (
            f"<{self.kept.label}: {self.base.mean:.3f} -> {self.kept.mean:.3f}, dP {self._change}, "
            f"{self._flips}, {self.kept.remains}: {outcome}>"
        )

    def _grounds(self) -> Iterator[str]:
        limit = f"the limit {-self.max_drop:+.1%}"
        if self.verdict == "fail":
            shared = f", n = {self._counted}" if self.clusters < self.n else ""
            yield f"dP {self._change} lies below {limit}: {self._flips}{shared}"
        if self.verdict == "inconclusive":
            yield from self._doubts(limit)

    def _doubts(self, limit: str) -> Iterator[str]:
        if self.clusters == 1 < self.n:
            yield (
                f"n = {self._counted} cannot decide, whatever they score: what another would have "
                f"lost does not show; use samples of several contexts"
            )
            return
        yield f"n = {self._counted} cannot decide: {limit} lies within dP {self._change}"
        if needed := self.samples_needed:
            alike = ", as many to a context," if self.clusters < self.n else ""
            yield f"about {needed} samples{alike} would decide"
        seen = stats.smallest_drop_seen(self._base, self._kept, clusters=self.base.contexts)
        yield f"{self.n} samples show drops from about {seen:.0%} up"

    def _oddities(self) -> Iterator[str]:
        if self.interval[0] > 0:
            p = stats.mcnemar(len(self.broke), len(self.mended))
            odds = f" (p = {p:.2g})" if self.clusters == self.n else ""  # of independent samples
            yield (
                f"better than the full cache, {self._flips}{odds}: "
                f"look at the answers, compression seldom helps but a scorer may err"
            )
        for ending in ("truncated", "looped"):
            before, after = self.base.endings[ending], self.kept.endings[ending]
            if after > before:
                yield f"{after} answers {ending}, {before} at baseline"
        if self.base.disagreements:
            yield f"{self.base.disagreements} baseline answers hang on rounding"

    @property
    def _change(self) -> str:
        low, high = self.interval
        return f"{self.dp:+z.1%} [{low:+z.1%}, {high:+z.1%}]"

    @property
    def _counted(self) -> str:
        if self.clusters == self.n:
            return str(self.n)
        return f"{self.n} in {self.clusters} context{'s' * (self.clusters > 1)}"

    @property
    def _flips(self) -> str:
        return f"{len(self.broke)} broke, {len(self.mended)} mended"

    @cached_property
    def _base(self) -> list[float]:
        return list(self.base.scores.values())

    @cached_property
    def _kept(self) -> list[float]:
        return [self.kept.scores[sample] for sample in self.base.scores]

    def _changed(self, direction: int) -> tuple[str, ...]:
        """Return the samples of both runs that went up (+1) or down (-1), where up is better."""
        up = direction if self.base.higher_is_better else -direction
        return tuple(
            sample
            for sample, before in self.base.scores.items()
            if (self.kept.scores.get(sample, before) - before) * up > 0
        )

    def _must_be_comparable(self) -> None:
        if self.refusal or self.observed is None:
            raise Refused(f"{self.kept.label}: {self.refusal or self.weakness}")


def _two_digits(count: int) -> int:
    """Round up to two digits: 138 is 140."""
    step = int(10 ** max(len(str(count)) - 2, 0))
    return -(-count // step) * step
