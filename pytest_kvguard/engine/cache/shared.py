"""Rows that share a prefix: it stays where it lies, and what each row keeps of it is a bias."""

from collections import Counter

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, attend_shared, bias_of, visible
from pytest_kvguard.engine.cache.base import ALIGNED, Cursor, LayerCache, Rows, widened
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.policies.base import EMPTY


class SharedPrefixCache(LayerCache):
    """One layer of R rows over the prefills of P prompts, M rows of each at the most.

    Rows are laid out by prompt, (P * M); where a prompt has fewer rows, one of them fills up.
    """

    def __init__(self, rows: Rows, layer: StackLayer, index: int, cursor: Cursor) -> None:
        self.layer, self.cursor, self.prompts = layer, cursor, rows.slots
        length = max(kept.length for kept in rows.kept)
        self.length = min(layer.keys.shape[2], -(-length // ALIGNED) * ALIGNED)
        self._lay_out(self.prompts)
        self.prefix_bias = self._by_prompt(self._bias(rows, index)[self.order])
        heads, size = layer.keys.shape[1], layer.keys.shape[-1]
        shape = (len(self.order), heads, cursor.capacity)
        self.keys = layer.keys.new_zeros(*shape, size)  # of new tokens, (P*M, Hkv, C, D)
        self.values = layer.values.new_zeros(*shape, layer.values.shape[-1])
        self.positions = torch.full((shape[0], 1, shape[2]), EMPTY, device=self.keys.device)
        self.bias = torch.full_like(self.positions, float("-inf"), dtype=torch.float32)

    def _bias(self, rows: Rows, index: int) -> Tensor:
        """What each row adds to its logits, (R, Hkv or 1, T) float32."""
        at = rows.places(self.layer, index)
        if all(kept.whole for kept in rows.kept):
            at = at[:, :1]
        out = torch.full((*at.shape[:2], self.length + 1), float("-inf"), device=at.device)
        return out.scatter_(2, at.masked_fill(at == EMPTY, self.length), 0.0)[..., :-1]

    def _lay_out(self, prompts: list[int]) -> None:
        """Find where each row goes. prompts: each row's slot in the stack."""
        counts = Counter(prompts)
        self.slots, most = list(counts), max(counts.values())
        of_slot = {s: [r for r, slot in enumerate(prompts) if slot == s] for s in self.slots}
        order = [row for s in self.slots for row in (of_slot[s] * most)[:most]]
        back = [0] * len(prompts)
        for place, row in reversed(list(enumerate(order))):
            back[row] = place
        device = self.layer.keys.device
        self.order = torch.tensor(order, device=device)  # (P*M,) the row at each place
        self.back = torch.tensor(back, device=device)  # (R,) the place of each row
        self.plain = order == list(range(len(prompts)))
        self.prefix = self._prefix(self.layer.keys), self._prefix(self.layer.values)

    def _prefix(self, held: Tensor) -> Tensor:
        """The prompts' part of the stack, (P, Hkv, T, D); copied only where it has gaps."""
        first, count = self.slots[0], len(self.slots)
        if self.slots == list(range(first, first + count)):
            return held[first : first + count, :, : self.length]
        return held[torch.tensor(self.slots, device=held.device), :, : self.length]

    def _by_prompt(self, bias: Tensor) -> Tensor:
        """(P*M, Hkv, T) -> (P, Hkv, M, 1, T)."""
        by_prompt = bias.unflatten(0, (len(self.slots), -1)).transpose(1, 2)
        return by_prompt.unsqueeze(3).contiguous()

    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Append the new tokens; attend to what each row keeps of its prompt, and to its own."""
        query, key, value = call.query, call.key, call.value
        if not self.plain:
            query, key, value = (x.index_select(0, self.order) for x in (query, key, value))
            asking = asking.index_select(0, self.order)
            real = None if real is None else real.index_select(0, self.order)
        width = asking.shape[1]
        self.write(self.cursor.slots(asking.device, width), key, value, asking, real)
        bias = self.bias
        if width > 1:
            bias = bias_of(visible(self.positions[:, 0], asking), torch.float32).unsqueeze(1)
        else:
            bias = bias.unsqueeze(2)
        out = attend_shared(
            query, self.prefix, self.prefix_bias, (self.keys, self.values), bias, call.scoring
        )
        return out if self.plain else out.index_select(0, self.back)

    def begin(self, keys: Tensor, values: Tensor, at: Tensor, real: Tensor) -> None:
        """Hold tokens (R, Hkv, n, D) that were fed before, at positions (R, n)."""
        slots = self.cursor.slots(at.device, at.shape[1])
        self.write(slots, *(x[self.order] for x in (keys, values, at, real)))

    def write(
        self, slots: Tensor, keys: Tensor, values: Tensor, at: Tensor, real: Tensor | None
    ) -> None:
        """Hold new tokens (P*M, Hkv, Q, D) at positions (P*M, Q); padding is never seen."""
        at = at if real is None else torch.where(real, at, EMPTY)
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)
        self.positions.index_copy_(2, slots, at[:, None])
        self.bias.index_copy_(2, slots, bias_of(at != EMPTY, torch.float32)[:, None])

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        places = self.back[rows]
        self.prompts = [self.prompts[row] for row in rows.tolist()]
        bias = self.prefix_bias.squeeze(3).transpose(1, 2).flatten(0, 1)[places]
        kept = [x[places] for x in (self.keys, self.values, self.positions, self.bias)]
        self._lay_out(self.prompts)
        self.prefix_bias = self._by_prompt(bias[self.order])
        self.keys, self.values, self.positions, self.bias = (x[self.order] for x in kept)

    def grow(self, more: int) -> None:
        """Make room for ``more`` new tokens."""
        self.keys, self.values = widened(self.keys, more, -2), widened(self.values, more, -2)
        self.positions = widened(self.positions, more, -1, EMPTY)
        self.bias = widened(self.bias, more, -1, float("-inf"))
