"""A compressed cache to look at and to answer from, for assertions about caches themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.kv.compress import Kept, importances, keep, keep_all, keep_masks
from pytest_kvguard.kv.decode import Answer, Stopping, greedy
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.own import kept_alone, prefills_alone
from pytest_kvguard.kv.prefill import Observe, prefill
from pytest_kvguard.kv.rope import find_rotation
from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.models import Loaded
from pytest_kvguard.policies.base import Policy


@dataclass(frozen=True)
class CompressedCache:
    """What a policy left of one prompt's cache.

    The last token of the prompt is not among what is held: it is fed again, so that an answer is
    read from the compressed cache alone.
    """

    prompt: Prompt
    kept: Kept
    full_bytes: int  # keys and values before compression
    loaded: Loaded

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.kept.bytes

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.kept.layers[0].heads[0].keys.device

    @property
    def held(self) -> Tensor:
        """Fraction of the prompt held, last token included, (layers, Hkv) float64."""
        return (self.kept.held.double() + 1) / len(self.prompt.ids)

    def positions(self, layer: int, head: int) -> list[int]:
        """Return the prompt positions a head of a layer holds, in order."""
        found: list[int] = self.kept.layers[layer].heads[head].positions[0].tolist()
        return found

    def answer(self, max_new_tokens: int = 32, stop: tuple[str, ...] = ()) -> str:
        """Answer greedily from the compressed cache; nothing more is evicted on the way."""
        seam = Seam(self.loaded.model)
        stopping = Stopping(max_new_tokens, self.loaded.eos, stop, self.loaded.decode)
        answer = Answer()
        with seam.open():
            greedy(seam, Rows([self.kept]), [self.prompt.tail], [answer], stopping)
        return stopping.text(answer.tokens)


def compress_text(loaded: Loaded, text: str, policy: Policy, ratio: float) -> CompressedCache:
    """Prefill a text and compress it. Raises InvalidArgument for an empty text."""
    ids = tuple(loaded.tokenizer(text)["input_ids"])
    if not ids:
        raise InvalidArgument("there is nothing to compress in an empty text")
    prompt = Prompt(ids, context=0)
    seam = Seam(loaded.model)
    with seam.open():
        held = prefill(seam, ids, Observe(policy.window, policy.needs_sums))
        rotation = find_rotation(seam) if policy.rerotate or policy.needs_turn else None
        full_bytes = keep_all(held, prompt.fed).bytes
        if prefills_alone(policy):
            kept, _ = kept_alone(seam, prompt, Cell(policy, ratio), held, rotation)
            return CompressedCache(prompt, kept, full_bytes, loaded)
        turn = rotation.turn if rotation else None
        states = held.states(prompt.about, prompt.protection(policy, seam.device), turn)
        masks = keep_masks(policy, importances(policy, states), states, ratio)
        budgets = [policy.budget(state, ratio) for state in states]
        rerotated = rotation if policy.rerotate else None
        kept = keep(held, masks, budgets, prompt.fed, rerotated).owned
    return CompressedCache(prompt, kept, full_bytes, loaded)
