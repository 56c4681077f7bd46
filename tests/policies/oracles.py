"""Each policy once more, as slow loops over float64 written from its paper's formulas.

An oracle ranks all positions of a head, the one that stays longest first; a budget of N keeps the
first N. Nothing here calls the package.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from pytest_kvguard.policies.base import LayerState

Ranking = list[int]


@lru_cache(maxsize=2)
def attention(state: LayerState) -> list[list[list[float]]]:
    """Causal softmax attention of every recorded query: [query head][query][key]."""
    queries, keys = state.queries.double().tolist(), state.keys.double().tolist()
    group, length = len(queries) // len(keys), len(keys[0])
    first = length - len(queries[0])
    return [
        [
            softmax(
                [
                    state.scaling * sum(a * b for a, b in zip(query, key, strict=True))
                    for key in keys[head // group][: first + row + 1]
                ],
                length,
            )
            for row, query in enumerate(rows)
        ]
        for head, rows in enumerate(queries)
    ]


def softmax(logits: list[float], length: int) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights] + [0.0] * (length - len(logits))


def votes(state: LayerState, head: int, window: int) -> list[list[float]]:
    """Attention each key gets from the last queries, for each query head of a kv head."""
    seen = attention(state)
    group = len(seen) // state.keys.shape[0]
    mine = seen[head * group : (head + 1) * group]
    return [[sum(column) for column in zip(*rows[-window:], strict=True)] for rows in mine]


def ranking(state: LayerState, value: Callable[[int], float], first: Ranking = ()) -> Ranking:
    """Protected positions, then ``first``, then the others by value; of equals the earlier."""
    length = state.keys.shape[1]
    protected = [at for at in range(length) if state.protected[at]]
    others = sorted(range(length), key=lambda at: (-value(at), at))
    return list(dict.fromkeys([*protected, *first, *others]))


def latest(length: int, count: int) -> Ranking:
    return list(range(length - 1, max(-1, length - 1 - count), -1))


def streaming_llm(state: LayerState, head: int, n: int, sinks: int = 4) -> Ranking:
    return ranking(state, lambda at: at, first=list(range(min(sinks, state.length))))


def knorm(state: LayerState, head: int, n: int) -> Ranking:
    keys = state.keys.double().tolist()[head]
    return ranking(state, lambda at: -math.sqrt(sum(x * x for x in keys[at])))


def tova(state: LayerState, head: int, n: int) -> Ranking:
    last = [rows[-1] for rows in attention(state)]
    return ranking(state, lambda at: sum(row[at] for row in last) / len(last))


def h2o(state: LayerState, head: int, n: int, heavy: str = "0.5") -> Ranking:
    recent = n - math.floor(Fraction(heavy) * n)
    group = len(state.queries) // len(state.keys)
    sums = state.attention_sums.double().tolist()[head * group : (head + 1) * group]
    return ranking(state, lambda at: sum(row[at] for row in sums), latest(state.length, recent))


def observed_attention(state: LayerState, head: int, n: int) -> Ranking:
    group = len(state.queries) // len(state.keys)
    sums = state.attention_sums.double().tolist()[head * group : (head + 1) * group]
    return ranking(state, lambda at: sum(row[at] for row in sums) / (state.length - at))


def snapkv(
    state: LayerState, head: int, n: int, window: int = 32, kernel: int = 5, pooling: str = "avg"
) -> Ranking:
    before = max(0, state.length - window)
    smooth = [0.0] * state.length
    for row in votes(state, head, window):
        for at in range(before):
            reach = range(at - kernel // 2, at + kernel // 2 + 1)
            near = [row[i] if 0 <= i < before else 0.0 for i in reach]
            smooth[at] += max(near) if pooling == "max" else sum(near) / kernel
    return ranking(state, lambda at: smooth[at], latest(state.length, window))


def chunkkv(state: LayerState, head: int, n: int, window: int = 32, length: int = 10) -> Ranking:
    before = max(0, state.length - window)
    every = [row for h in range(len(state.keys)) for row in votes(state, h, window)]
    total = [sum(row[at] for row in every) for at in range(state.length)]
    runs = [range(at, min(at + length, before)) for at in range(0, before, length)]
    mean = {at: sum(total[i] for i in run) / len(run) for run in runs for at in run}
    return ranking(state, lambda at: mean.get(at, 0.0), latest(state.length, window))


def kept_shots(state: LayerState, n: int, window: int, rule: str) -> set[int]:
    """ShotKV, equations 3 to 6, with everything outside shots charged."""
    every = [row for h in range(len(state.keys)) for row in votes(state, h, window)]
    shots = [[at for span in unit for at in span] for unit in state.units]
    inside = {at for shot in shots for at in shot}
    kept = {at for at in range(state.length) if at not in inside or state.protected[at]}
    score = [sum(row[at] for at in shot for row in every) / len(shot) for shot in shots]
    for index in sorted(range(len(shots)), key=lambda i: (-score[i], i)):
        if len(kept | set(shots[index])) <= n:
            kept |= set(shots[index])
        elif rule == "stop":
            break
    return kept
