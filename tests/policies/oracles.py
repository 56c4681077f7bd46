"""Each policy once more, as slow loops over float64 written from its paper's formulas.

An oracle ranks all positions of a head, the one that stays longest first; a budget of N keeps the
first N. Nothing here calls the package.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import numpy as np

from pytest_kvguard.policies.base import LayerState
from tests.strategies import PACES

Ranking = list[int]


@lru_cache(maxsize=2)
def attention(state: LayerState) -> list[list[list[float]]]:
    """Causal softmax attention of every recorded query: [query head][query][key].

    With a soft cap where there is one; of a sink's weight nothing is left over.
    """
    cap = state.softcap
    sinks = [None] * len(state.queries) if state.sinks is None else state.sinks.tolist()
    queries, keys = state.queries.double().tolist(), state.keys.double().tolist()
    group, length = len(queries) // len(keys), len(keys[0])
    first = length - len(queries[0])
    return [
        [
            softmax(
                [
                    capped(state.scaling * sum(a * b for a, b in zip(query, key, strict=True)), cap)
                    for key in keys[head // group][: first + row + 1]
                ],
                length,
                sinks[head],
            )
            for row, query in enumerate(rows)
        ]
        for head, rows in enumerate(queries)
    ]


def capped(logit: float, cap: float | None) -> float:
    return logit if cap is None else cap * math.tanh(logit / cap)


def softmax(logits: list[float], length: int, sink: float | None = None) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink - top))
    return [weight / total for weight in weights] + [0.0] * (length - len(logits))


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


def smoothed(
    state: LayerState, head: int, window: int = 32, kernel: int = 5, pooling: str = "avg"
) -> list[float]:
    """Attention paid by the window to what is before it, pooled and added up over the group."""
    before = max(0, state.length - window)
    smooth = [0.0] * state.length
    for row in votes(state, head, window):
        for at in range(before):
            reach = range(at - kernel // 2, at + kernel // 2 + 1)
            near = [row[i] if 0 <= i < before else 0.0 for i in reach]
            smooth[at] += max(near) if pooling == "max" else sum(near) / kernel
    return smooth


def snapkv(
    state: LayerState, head: int, n: int, window: int = 32, kernel: int = 5, pooling: str = "avg"
) -> Ranking:
    smooth = smoothed(state, head, window, kernel, pooling)
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


def keydiff(state: LayerState, head: int, n: int) -> Ranking:
    keys = state.keys[head].double().numpy()
    unit = np.array([key / math.sqrt(key @ key) for key in keys])
    anchor = sum(unit) / len(unit)
    return ranking(state, lambda at: -(unit[at] @ anchor))


def lagkv(state: LayerState, head: int, n: int, sinks: int = 16, lag: int = 128) -> Ranking:
    length = state.length
    starts = list(range(sinks, length - lag + 1, lag))
    rated = [s for s in starts if s + lag in starts]
    place = {}
    for start in rated:
        score = np.zeros(lag)
        for held in (state.keys[head].double().numpy(), state.values[head].double().numpy()):
            run, following = held[start : start + lag], held[start + lag : start + 2 * lag]
            low, high = following.min(axis=0), following.max(axis=0)
            spread = [np.std((token - low) / (high - low), ddof=1) for token in run]
            score += np.exp(spread) / np.exp(spread).sum()
        for rank, at in enumerate(np.argsort(-score, kind="stable")):
            place[start + int(at)] = rank
    end = [at for at in reversed(range(min(sinks, length), length)) if at not in place]
    first = [*range(min(sinks, length)), *end]
    return ranking(state, lambda at: -place.get(at, 0), first)


def rotation(position: int, paces: tuple[float, ...]) -> np.ndarray:
    """RoPE at a position: channel i turns with channel i + D/2."""
    half = len(paces)
    matrix = np.zeros((2 * half, 2 * half))
    for i, pace in enumerate(paces):
        cos, sin = math.cos(position * pace), math.sin(position * pace)
        matrix[i, i], matrix[i, i + half] = cos, -sin
        matrix[i + half, i], matrix[i + half, i + half] = sin, cos
    return matrix


def page_bound(query: list[float], keys: list[list[float]]) -> float:
    """Quest, algorithm 1: what no product of the query with a key of the page exceeds."""
    channels = zip(query, zip(*keys, strict=True), strict=True)
    return sum(max(q * min(channel), q * max(channel)) for q, channel in channels)


def expected_attention(
    state: LayerState, head: int, n: int, future: int = 512, sinks: int = 4
) -> Ranking:
    length, group = state.length, len(state.queries) // len(state.keys)
    keys, values = state.keys[head].double().numpy(), state.values[head].double().numpy()
    to_come = sum(rotation(at, PACES) for at in range(length, length + future)) / future
    total = dict.fromkeys(range(sinks, length), 0.0)
    for rotated in state.queries[head * group : (head + 1) * group].double().numpy():
        plain = [np.linalg.inv(rotation(at, PACES)) @ rotated[at] for at in total]
        if not plain:
            continue
        mean = to_come @ np.mean(plain, axis=0)
        covariance = to_come @ np.cov(np.array(plain).T, bias=True) @ to_come.T
        log = {
            at: state.scaling * (mean @ keys[at])
            + state.scaling**2 / 2 * (keys[at] @ covariance @ keys[at])
            for at in total
        }
        mass = sum(math.exp(value) for value in log.values())
        for at in total:
            total[at] += math.exp(log[at]) / mass / group
    first = list(range(min(sinks, length)))
    norm = [math.sqrt(value @ value) for value in values]
    return ranking(state, lambda at: total.get(at, 0.0) * norm[at], first)


def criticalkv(
    state: LayerState, head: int, n: int, window: int = 32, kernel: int = 5, first: str = "0.5"
) -> Ranking:
    group = len(state.queries) // len(state.keys)
    outputs = state.output.double().numpy()[head * group : (head + 1) * group]
    values = state.values[head].double().numpy()
    norm = [sum(np.abs(value @ output).sum() for output in outputs) / group for value in values]
    attended = snapkv(state, head, n, window, kernel)[: math.floor(Fraction(first) * n)]
    smooth = smoothed(state, head, window, kernel)
    queries = min(window, state.length) * group
    return ranking(
        state,
        lambda at: (smooth[at] / queries + 1e-4) * norm[at],
        [*attended, *latest(state.length, window)],
    )


def vatp(state: LayerState, head: int, n: int, heavy: str = "0.5", sinks: int = 20) -> Ranking:
    recent = n - math.floor(Fraction(heavy) * n)
    group = len(state.queries) // len(state.keys)
    sums = state.attention_sums.double().tolist()[head * group : (head + 1) * group]
    size = [sum(abs(x) for x in value) for value in state.values[head].double().tolist()]
    first = [*latest(state.length, recent), *range(min(sinks, state.length))]
    return ranking(state, lambda at: sum(row[at] for row in sums) * size[at], first)


def adakv(
    state: LayerState, n: int, window: int = 32, kernel: int = 5, floor: str = "0.2"
) -> list[set[int]]:
    """What each head keeps: its own best, then the best of all heads."""
    heads, protected = range(len(state.keys)), int(state.protected.sum())
    sure = max(1, math.floor(Fraction(floor) * n), protected)
    kept = [set(snapkv(state, head, n, window, kernel)[:sure]) for head in heads]
    smooth = [smoothed(state, head, window, kernel) for head in heads]
    before = state.length - window

    def order(place: tuple[int, int]) -> tuple[float, ...]:
        head, at = place
        return (0, -at, head) if at >= before else (1, -smooth[head][at], at, head)

    places = sorted(((head, at) for head in heads for at in range(state.length)), key=order)
    for head, at in places:
        if sum(map(len, kept)) < n * len(kept):
            kept[head].add(at)
    return kept


def fastgen(
    state: LayerState,
    n: int,
    threshold: float = 0.9,
    frequent: float = 0.3,
    local: float = 0.3,
    window: int = 32,
) -> tuple[list[set[int]], list[int]]:
    """What each head keeps, and which of the five sets that is."""
    length, heads = state.length, range(len(state.keys))
    if n == length:
        return [set(range(length)) for _ in heads], []
    protected = {at for at in range(length) if state.protected[at]}
    special = [at for at in range(length) if state.special[at]] or [0]
    if len(protected | set(special)) >= n:
        kept = [*protected, *(at for at in special if at not in protected)][:n]
        return [set(kept) for _ in heads], []
    punctuation = {at for at in range(length) if state.punctuation[at]}
    latest_count = math.floor(Fraction(str(local)) * n)
    seen, group = attention(state), len(state.queries) // len(state.keys)
    sets, mass = [], []
    for head in heads:
        rows = state.attention_sums.double()[head * group : (head + 1) * group].sum(dim=0).tolist()
        ranked = sorted(range(length), key=lambda at: (-rows[at], at))
        special_only = protected | set(special)
        punctuated = special_only | punctuation
        heavy = punctuated | set(ranked[: math.floor(Fraction(str(frequent)) * n)])
        near = heavy | set(latest(length, latest_count))
        sets.append([special_only, punctuated, heavy, near, set(range(length))])
        queries = [
            (length - len(queries[-window:]) + i, row)
            for queries in seen[head * group : (head + 1) * group]
            for i, row in enumerate(queries[-window:])
        ]
        mass.append(
            [
                sum(row[at] for _, row in queries for at in held) / len(queries)
                for held in (special_only, punctuated, heavy)
            ]
        )
        mass[-1].append(
            sum(
                row[at]
                for asking, row in queries
                for at in heavy | set(range(max(0, asking - latest_count + 1), asking + 1))
            )
            / len(queries)
        )
    for lowered in sorted({threshold, *(m for row in mass for m in row)}, reverse=True):
        if lowered > threshold:
            continue
        choices = [next((i for i, m in enumerate(row) if m >= lowered), 4) for row in mass]
        if sum(len(sets[head][choices[head]]) for head in heads) <= n * len(sets):
            return [sets[head][choices[head]] for head in heads], choices
    raise AssertionError("special tokens alone fit")
