import pytest
import torch

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.policies.recency import favour_earliest, favour_latest
from pytest_kvguard.policies.selectors import (
    top_chunks,
    top_over_heads,
    top_tokens,
    whole_units,
)
from tests.strategies import a_state

INF = float("inf")


def kept(select, importance, n, **state):
    """Select on one head and return the positions kept."""
    values = torch.tensor([importance], dtype=torch.float32)
    mask = select(values, n, a_state(len(importance), heads=1, **state))
    assert mask.shape == values.shape
    assert mask.dtype == torch.bool
    return mask[0].nonzero().flatten().tolist()


class TestTopTokens:
    def test_keeps_the_most_important(self):
        assert kept(top_tokens, [3, 1, 2, 5], 2) == [0, 3]

    def test_keeps_the_earlier_of_equals(self):
        assert kept(top_tokens, [1, 2, 1, 2, 1, 2], 4) == [0, 1, 3, 5]

    def test_keeps_the_earlier_of_many_equals(self):
        # torch.topk leaves the order of ties open, and uses it from some size on
        assert kept(top_tokens, [0] * 3000, 1000) == list(range(1000))

    def test_keeps_protected_positions_whatever_their_importance_and_charges_them(self):
        assert kept(top_tokens, [INF, 1, -INF, 2], 2, protected=(2,)) == [0, 2]

    def test_chooses_for_each_head_by_itself(self):
        mask = top_tokens(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), 1, a_state(3))
        assert mask.tolist() == [[False, False, True], [True, False, False]]

    def test_ranks_infinite_importances(self):
        assert kept(top_tokens, [-INF, 0, INF, -INF], 3) == [0, 1, 2]


class TestTopChunks:
    def test_keeps_whole_runs_by_their_mean(self):
        assert kept(top_chunks(2), [0, 5, 3, 3, 1, 1], 4) == [0, 1, 2, 3]
        assert kept(top_chunks(2), [0, 5, 3, 3, 1, 1], 2) == [2, 3]

    def test_gives_the_room_left_to_the_earliest_of_the_next_run(self):
        assert kept(top_chunks(3), [1, 1, 1, 0, 0, 9], 4) == [0, 3, 4, 5]

    def test_a_shorter_last_run_is_at_no_disadvantage(self):
        assert kept(top_chunks(3), [1, 1, 1, 2], 1) == [3]

    def test_lone_positions_stand_for_themselves(self):
        assert kept(top_chunks(2, alone=2), [4, 4, 9, 1], 3) == [0, 1, 2]

    def test_nothing_but_lone_positions_is_ranked_by_importance(self):
        assert kept(top_chunks(2, alone=9), [1, 3, 2], 2) == [1, 2]

    def test_charges_protected_positions(self):
        assert kept(top_chunks(2), [5, 5, 0, 0, 1, 1], 3, protected=(3,)) == [0, 1, 3]

    def test_keeps_the_earlier_of_equal_runs_though_their_sums_are_inexact(self):
        assert kept(top_chunks(10), [0.9] * 27, 12) == list(range(12))

    @pytest.mark.parametrize("length", [0, -1, 2.0, True])
    def test_refuses_a_length_that_is_no_count(self, length):
        with pytest.raises(InvalidArgument, match="length must be a whole number"):
            top_chunks(length)


class TestTopOverHeads:
    def of(self, importance, n, floor=0.0, **state):
        values = torch.tensor(importance, dtype=torch.float32)
        mask = top_over_heads(floor)(values, n, a_state(values.shape[1], **state))
        return [row.nonzero().flatten().tolist() for row in mask]

    def test_gives_the_room_to_the_most_important_of_all_heads(self):
        assert self.of([[9, 8, 7, 6], [1, 5, 2, 3]], 2) == [[0, 1, 2], [1]]

    def test_no_head_is_emptied(self):
        assert self.of([[9, 8, 7, 6], [1, 2, 5, 3]], 2, floor=0.0) == [[0, 1, 2], [2]]

    def test_the_floor_is_a_share_of_the_mean_rounded_down(self):
        rows = [[9, 8, 7, 6, 5, 5], [1, 2, 3, 4, 0, 0]]
        assert self.of(rows, 3, floor=0.67) == [[0, 1, 2, 3], [2, 3]]
        assert self.of(rows, 3, floor=0.66) == [[0, 1, 2, 3, 4], [3]]
        assert self.of(rows, 3, floor=1.0) == [[0, 1, 2], [1, 2, 3]]

    def test_of_equals_the_earlier_stays_and_then_the_one_of_the_lower_head(self):
        assert self.of([[0] * 6, [0] * 6, [0] * 6], 3, heads=3) == [[0, 1, 2]] * 3
        assert self.of([[5, 1, 1], [1, 1, 1], [1, 1, 1]], 1, heads=3) == [[0], [0], [0]]
        assert self.of([[5, 1, 1, 1], [1, 5, 1, 1]], 2) == [[0, 1], [0, 1]]

    def test_keeps_protected_positions_in_every_head_and_charges_them(self):
        kept = self.of([[9, 8, 7, 6], [1, 2, 5, 3]], 2, protected=(1, 3))
        assert kept == [[1, 3], [1, 3]]

    def test_ranks_infinite_importances(self):
        assert self.of([[INF, -INF, INF], [-INF, 0, -INF]], 2) == [[0, 2], [0, 1]]

    def test_refuses_a_floor_that_is_no_share(self):
        with pytest.raises(InvalidArgument, match=r"floor must be in \[0, 1\], got 2"):
            top_over_heads(2)


UNITS = ((range(0, 3),), (range(3, 4), range(8, 10)), (range(4, 6),), (range(6, 8),))


class TestWholeUnits:
    def test_ranks_units_by_their_mean_over_all_their_spans(self):
        importance = [3, 3, 3, 9, 4, 4, 1, 1, 0, 0]  # means 3, 3, 4, 1
        assert kept(whole_units(), importance, 2, units=UNITS) == [4, 5]
        assert kept(whole_units(), importance, 5, units=UNITS) == [0, 1, 2, 4, 5]

    def test_skip_goes_on_past_a_unit_that_does_not_fit(self):
        importance = [5, 5, 5, 4, 3, 3, 2, 2, 4, 4]
        assert kept(whole_units("skip"), importance, 5, units=UNITS) == [0, 1, 2, 4, 5]

    def test_stop_ends_at_a_unit_that_does_not_fit(self):
        importance = [5, 5, 5, 4, 3, 3, 2, 2, 4, 4]
        assert kept(whole_units("stop"), importance, 5, units=UNITS) == [0, 1, 2]

    def test_adds_up_the_heads_and_keeps_the_same_for_all(self):
        importance = torch.tensor([[4.0, 4, 1, 1], [0, 0, 5, 5]])
        state = a_state(4, units=((range(0, 2),), (range(2, 4),)))
        assert whole_units()(importance, 2, state).tolist() == [[False, False, True, True]] * 2

    def test_keeps_and_charges_what_is_outside_all_units(self):
        units = ((range(1, 3),), (range(4, 6),))
        assert kept(whole_units(), [0, 1, 1, 0, 9, 9], 4, units=units) == [0, 3, 4, 5]

    def test_keeps_only_what_must_stay_when_no_unit_fits(self):
        units = ((range(1, 3),), (range(4, 6),))
        assert kept(whole_units(), [0, 1, 1, 0, 9, 9], 3, units=units) == [0, 3]

    def test_keeps_nothing_of_one_giant_unit_larger_than_the_room(self):
        assert kept(whole_units(), [1] * 8, 7, units=((range(0, 7),),)) == [7]

    def test_a_unit_costs_only_what_is_not_protected_of_it(self):
        units = ((range(0, 3),), (range(3, 6),))
        assert kept(whole_units(), [0, 0, 0, 9, 9, 9], 4, units=units, protected=(3, 4)) == [
            3,
            4,
            5,
        ]

    def test_keeps_the_earlier_of_equal_units_though_their_sums_are_inexact(self):
        units = ((range(0, 10),), (range(10, 17),), (range(17, 20),))
        assert kept(whole_units(), [0.9] * 20, 10, units=units) == list(range(10))

    def test_infinite_importances_do_not_cancel_out(self):
        units = ((range(0, 2),), (range(2, 4),))
        assert kept(whole_units(), [INF, -INF, 1, 1], 2, units=units) == [2, 3]

    def test_a_prompt_without_units_is_an_error_that_names_other_policies(self):
        with pytest.raises(InvalidArgument, match=r"no units.*snapkv"):
            kept(whole_units(), [1, 2], 1)

    def test_nothing_kept_at_all_is_refused(self):
        with pytest.raises(Refused, match="none of the 1 units fits into 2 of 3 positions"):
            kept(whole_units(), [1, 1, 1], 2, units=((range(0, 3),),))

    def test_refuses_another_rule(self):
        with pytest.raises(InvalidArgument, match="rule must be one of skip, stop; got 'best'"):
            whole_units("best")


class TestFavourLatest:
    def test_lifts_the_latest_above_all_and_the_last_highest(self):
        lifted = favour_latest(torch.tensor([[7.0, 1, 9, 2]]), 3)
        assert lifted.argsort(descending=True).tolist() == [[3, 2, 1, 0]]

    def test_leaves_the_others_and_its_input_alone(self):
        importance = torch.tensor([[7.0, 1, 9, 2]])
        assert favour_latest(importance, 1)[0, :3].tolist() == [7, 1, 9]
        assert importance.tolist() == [[7, 1, 9, 2]]

    @pytest.mark.parametrize(("count", "order"), [(0, [1, 0]), (9, [1, 0])])
    def test_counts_from_none_to_more_than_there_are(self, count, order):
        lifted = favour_latest(torch.tensor([[1.0, 2]]), count)
        assert lifted.argsort(descending=True).tolist() == [order]

    @pytest.mark.parametrize("highest", [2.0**24, 1e30])
    def test_lifts_above_importances_of_any_size(self, highest):
        lifted = favour_latest(torch.tensor([[highest, highest * 2, 1, 2, 3]]), 3)
        assert lifted.argsort(descending=True, stable=True).tolist() == [[4, 3, 2, 1, 0]]
        assert len(set(lifted[0].tolist())) == 5

    def test_lifts_above_the_others_of_any_head(self):
        lifted = favour_latest(torch.tensor([[7.0, 1], [90, 2]]), 1)
        assert lifted[0, 1] == lifted[1, 1] > 90


class TestFavourEarliest:
    def test_lifts_the_earliest_above_all_alike_and_leaves_the_others(self):
        importance = torch.tensor([[7.0, 1, 9], [1, 2, 30]])
        lifted = favour_earliest(importance, 2)
        assert (lifted[:, :2] == lifted[0, 0]).all()
        assert lifted[0, 0] > 30
        assert lifted[:, 2].tolist() == [9, 30] == importance[:, 2].tolist()

    def test_lifts_above_importances_of_any_size(self):
        assert favour_earliest(torch.tensor([[1.0, 1e30]]), 1)[0, 0] > 1e30

    @pytest.mark.parametrize("count", [0, 9])
    def test_counts_from_none_to_more_than_there_are(self, count):
        lifted = favour_earliest(torch.tensor([[1.0, 2]]), count)
        assert lifted.tolist() == ([[1, 2]] if count == 0 else [[3, 3]])
