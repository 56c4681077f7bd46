import pytest

CELL = {
    "model": "tiny",
    "ability": "retrieval",
    "task": "retrieval",
    "policy": "snapkv",
    "spec": "snapkv",
    "params": {"window": 32},
    "ratio": 0.25,
    "protocol": "prompt",
    "units": None,
    "n": 50,
    "clusters": 50,
    "base": 0.96,
    "kept": 0.94,
    "dp": -0.0208,
    "interval": [-0.0881, 0.0364],
    "level": 0.9,
    "broke": ["s47"],
    "mended": [],
    "saves": "positions",
    "held": {"min": 0.2, "mean": 0.24, "max": 0.25},
    "read": None,
    "bytes_full": 80,
    "bytes_held": 20,
    "bytes_padding": 4,
    "peak_bytes": None,
    "verdict": "pass",
    "skipped": False,
    "reason": "",
    "max_drop": 0.1,
    "samples_needed": None,
    "fidelity": {"kl": 0.01, "agreement": 0.99},
    "endings": {"ended": 48, "truncated": 2, "looped": 0},
    "counts": {"prefills": 50, "forwards": 90, "tokens": 9000},
    "seconds": 1.5,
}

FAILED = CELL | {
    "task": "long_generation",
    "policy": "streaming_llm",
    "spec": "streaming_llm",
    "kept": 0.4,
    "dp": -0.5833,
    "interval": [-0.6931, -0.4652],
    "broke": [f"s{i}" for i in range(20, 48)],
    "verdict": "fail",
    "reason": "28 broke, 0 mended",
}

INCONCLUSIVE = CELL | {
    "task": "world_knowledge",
    "protocol": "context",
    "spec": "snapkv(window=16, kernel=5)",
    "ratio": 0.5,
    "verdict": "inconclusive",
    "reason": "n = 50 cannot decide",
    "samples_needed": 140,
}

REFUSED = CELL | {
    "ratio": 1.0,
    "dp": None,
    "interval": [None, None],
    "held": None,
    "verdict": "refused",
    "reason": "nothing was evicted",
}


@pytest.fixture
def cell():
    return CELL


@pytest.fixture
def cells():
    return [CELL, INCONCLUSIVE, REFUSED, FAILED]
