"""The oracle: an untouched model of transformers, told by a mask what each token may see."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.evicting import Decoding, EvictingCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.grid import About, Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook, find_rotation
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.select import Kept, importances, keep, keep_masks
from pytest_kvguard.engine.stack import Prefill
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.storage.base import Storage
from tests.tiny import WINDOW, tokens

PROMPT = tokens(41)
ANSWER = tokens(7, seed=1)
FED = [PROMPT[-1], *ANSWER]  # what goes through the compressed cache
UNITS = tuple((range(start, start + 6),) for start in range(2, 32, 6))
RATIO = 0.5
SMALL = {
    "snapkv": "(window=5)",
    "pyramidkv": "(window=5)",
    "scope": "(window=3, recent=2)",
    "adakv": "(window=5)",
    "adapyramidkv": "(window=5)",
    "criticalkv": "(window=5)",
    "chunkkv": "(window=5, length=4)",
    "lagkv": "(sinks=2, lag=5)",
    "vatp": "(sinks=2)",
}
POLICY_NAMES = sorted(n for n in POLICIES if get_policy(n).saves == "positions")


def policy_of(name: str) -> Policy:
    return get_policy(name + SMALL.get(name, ""))


EVICTING = [
    *(n for n in POLICY_NAMES if policy_of(n).decode is not None),
    "snapkv(window=5)+h2o",
    "snapkv(window=5)+tova",
    "shotkv(window=5)+h2o@0.4",
    "shotkv+scope(strategy=discontinuous, window=3, recent=2, every=3)",
]


def compressed(
    hook: AttentionHook, policy: Policy, ratio: float = RATIO
) -> tuple[Prefill, list[Tensor], Kept]:
    prompt = Prompt(tuple(PROMPT), context=0, about=About(units=UNITS))
    [held] = prefill(hook, [Wanted(prompt.ids)], Observe(policy.window, policy.needs_sums))
    turn = find_rotation(hook).turn if policy.needs_turn else None
    states = held.states(prompt.about, prompt.protection(policy, torch.device("cpu")), turn)
    masks = keep_masks(policy, importances(policy, states), states, ratio)
    budgets = [policy.budget(state, ratio) for state in states]
    return held, masks, keep(held, masks, budgets, prompt.fed)


def decoding_of(policy: Policy, rotation: Rotation | None = None) -> Decoding:
    return Decoding(
        eviction=policy.decode,
        ratio=torch.tensor([Cell(policy, RATIO).decode_ratio], dtype=torch.float64),
        prompt_length=torch.tensor([len(PROMPT)]),
        fresh=torch.tensor([len(PROMPT)]),
        new=(len(FED),),
        rotation=rotation,
    )


def evicting_group(
    policy: Policy, kept: Kept, rotation: Rotation | None = None, storage: Storage | None = None
) -> Group:
    make = partial(EvictingCache, decoding=decoding_of(policy, rotation), storage=storage)
    return Group.of(Rows([kept]), make, sliding=DenseCache, capacity=len(FED))


def feed(hook: AttentionHook, group: Group, width: int) -> Tensor:
    """Feed one row what follows the prompt, ``width`` tokens at a time: (len(FED), V).

    One by one they are fed as generation feeds them.
    """
    batch = Batch(hook, [group], [len(PROMPT) - 1])
    if width == 1:
        return torch.cat(steps(batch, [FED]))
    pieces = [FED[at : at + width] for at in range(0, len(FED), width)]
    return torch.cat([batch.feed([piece], last=len(piece))[0] for piece in pieces])


def steps(batch: Batch, fed: Sequence[Sequence[int]]) -> list[Tensor]:
    """Feed each row its tokens one by one, as generation does; a list of logits (R, V)."""
    found = []
    for tokens_of_rows in zip(*fed, strict=True):
        batch.make_room(1, 3)
        found.append(batch.step(torch.tensor(tokens_of_rows)[:, None]))
        batch.counted()
    return found


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in str(type(m))]
    return sorted(found, key=lambda m: m.layer_idx)


@contextmanager
def masked(model: PreTrainedModel, masks: dict[int, Tensor]) -> Iterator[None]:
    """Give each attention layer of a stock model its own (1, Hq, Q, T) mask."""

    def swap(module, args, kwargs):
        mask = masks[module.layer_idx]
        hidden = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, float("-inf"))
        return args, {**kwargs, "attention_mask": hidden}

    hooks = [m.register_forward_pre_hook(swap, with_kwargs=True) for m in attentions(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stock_logits(model: PreTrainedModel, masks: dict[int, Tensor]) -> Tensor:
    """What the untouched model says to the tokens fed after compression, (len(FED), V)."""
    ids = torch.tensor([PROMPT + ANSWER])
    with torch.inference_mode(), masked(model, masks):
        return model(ids).logits[0, len(PROMPT) - 1 :]


def plain_logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT + ANSWER])).logits[0, len(PROMPT) - 1 :]


def hidden_by(
    seen: dict[int, list[Tensor]], held: Prefill, model: PreTrainedModel
) -> dict[int, Tensor]:
    """Masks of a stock model: causal, and each fed token sees only what ``seen`` says.

    seen: for each compressible layer, for each fed token, (Hkv or Hq, T + fed) bool.
    """
    total, first = len(PROMPT) + len(ANSWER), len(PROMPT) - 1
    heads = model.config.num_attention_heads
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    masks = {}
    for layer in held.stack.layers.values():
        mask = causal.expand(1, heads, -1, -1).clone()
        if layer.window is not None:
            mask &= ~torch.ones(total, total, dtype=torch.bool).tril(-WINDOW)
        else:
            for row, some in enumerate(seen[layer.layer]):
                mask[0, :, first + row] &= some.repeat_interleave(heads // some.shape[0], dim=0)
        masks[layer.layer] = mask
    return masks


def stock_logits_of(masks: Sequence[Tensor], held: Prefill, model: PreTrainedModel) -> Tensor:
    """What a stock model says where each layer's mask (Hkv, T) is all that is left of a prompt."""
    after = torch.ones(len(FED), dtype=torch.bool)  # what is fed sees what was fed
    seen = {
        layer.layer: [torch.cat([m[:, :-1], after.expand(len(m), -1)], dim=1)] * len(FED)
        for layer, m in zip(held.stack.compressible, masks, strict=True)
    }
    return stock_logits(model, hidden_by(seen, held, model))
