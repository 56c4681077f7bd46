"""Pairs of runs that prove nothing, whatever they score."""

import math
from collections.abc import Iterator

from pytest_kvguard.harness.records import FULL, Held, Run

ROUNDING = 1e-9
"""What dividing two counts may be off by; far less than one token of any prompt."""


def refusals(base: Run, kept: Run) -> Iterator[str]:
    """Yield each reason why ``kept`` cannot be judged against ``base``, the gravest first."""
    for run in (base, kept):
        if run.error is not None:
            yield f"{run.label} ended with an error: {run.error}"
    yield from _mismatches(base, kept)
    if not base.scores:
        yield "no sample was run"
    elif base.mean == 0 and not base.higher_is_better:
        yield (
            f"the baseline scores 0 on all {len(base.scores)} samples, dP is undefined; "
            f"score the opposite, 1 - score, with higher_is_better=True"
        )
    yield from _vacuities(kept)


def _mismatches(base: Run, kept: Run) -> Iterator[str]:
    if base.policy != FULL:
        yield f"the baseline ran under {base.policy!r}, not with the full cache"
    for what, before, after in (
        ("task", base.task, kept.task),
        ("protocol", base.protocol, kept.protocol),
    ):
        if before != after:
            yield f"the baseline's {what} is {before!r}, the compressed run's {after!r}"
    if odd := sorted(base.scores.keys() ^ kept.scores.keys()):
        names = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if odd[3:] else "")
        yield f"baseline and compressed run did not answer the same samples: {names}"
    elif odd := [s for s in base.scores if base.clusters.get(s) != kept.clusters.get(s)]:
        yield f"baseline and compressed run did not read sample {odd[0]} in the same context"


def _vacuities(kept: Run) -> Iterator[str]:
    if kept.held is None:
        yield "what the compressed run held was not measured"
    elif kept.saves == "bytes":
        yield from _idle_storage(kept)
    elif kept.saves == "reads":
        yield from _idle_reading(kept)
    else:
        yield from _idle_eviction(kept, kept.held)


def _idle_eviction(kept: Run, held: Held) -> Iterator[str]:
    if held.min >= 1 and not kept.evicted and kept.bytes_held >= kept.bytes_full:
        yield (
            "nothing was evicted, so passing would prove nothing; "
            "use longer prompts or a lower keep ratio"
        )
    if held.mean > kept.ratio + ROUNDING:  # layers may share a budget unequally
        yield (
            f"{held.mean:.2%} of the prompts was held where {kept.ratio:.2%} was asked for; "
            f"the policy exceeds its budget, or the ratio is less than one token of the prompt"
        )


def _idle_storage(kept: Run) -> Iterator[str]:
    if kept.bytes_held >= kept.bytes_full:
        yield (
            f"the cache takes {kept.bytes_held} bytes, {kept.bytes_full} in full, so passing would "
            f"prove nothing; use longer prompts, a smaller residual or skip fewer layers"
        )
    elif kept.bytes_held > (kept.ratio + ROUNDING) * kept.bytes_full:
        share = kept.bytes_held / kept.bytes_full
        yield (
            f"{share:.2%} of the full cache's bytes were held where {kept.ratio:.2%} was asked "
            f"for; ask for a ratio of {math.ceil(1000 * share) / 1000:g} or store in fewer bits"
        )


def _idle_reading(kept: Run) -> Iterator[str]:
    if kept.read is None:
        yield "what the compressed run read was not measured"
    elif kept.read >= 1:
        yield (
            "everything that was held was read, so passing would prove nothing; "
            "use longer prompts, a lower keep ratio or smaller pages"
        )
    elif kept.read > kept.ratio + ROUNDING:
        yield (
            f"{kept.read:.2%} of what was held was read where {kept.ratio:.2%} was asked for; "
            f"let no layer read everything, or ask for a larger ratio"
        )
