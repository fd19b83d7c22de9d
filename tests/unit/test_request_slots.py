import numpy as np
import pytest

from vllm_budgetdraft.vllm_integration.v1.request_slots import Holding, RequestSlots


class Request:
    """vLLM's object for a request; only its identity matters."""


def test_slots_are_distinct_and_come_back():
    slots = RequestSlots(3)
    taken = [slots.take(name, Request()).slot for name in "abc"]
    assert sorted(taken) == [0, 1, 2]
    assert slots.release("b") == taken[1]
    assert slots.take("d", Request()).slot == taken[1]


def test_a_request_finds_its_own_slot_whatever_its_row():
    slots, request = RequestSlots(2), Request()
    holding = slots.take("a", request)
    slots.take("b", Request())
    assert slots.get("a", request) is holding
    assert slots.get("c", request) is None


def test_another_request_that_reuses_an_id_does_not_inherit_the_cache():
    slots = RequestSlots(2)
    slots.take("a", Request())
    assert slots.get("a", Request()) is None


def test_finished_and_replaced_requests_have_ended_and_others_have_not():
    slots = RequestSlots(4)
    requests = {name: Request() for name in "abcd"}
    for name, request in requests.items():
        slots.take(name, request)
    live = {"a": requests["a"], "b": Request(), "d": requests["d"]}
    assert slots.ended(live) == ["b", "c"]


def test_only_requests_outside_the_batch_are_idle_and_the_oldest_goes_first():
    slots = RequestSlots(4)
    for name in ("waiting", "running", "also_waiting"):
        slots.take(name, Request())
    assert slots.num_free == 1
    assert slots.idle(batch={"running", "new"}) == ["waiting", "also_waiting"]


@pytest.mark.parametrize(
    ("context", "num_cached"),
    [
        pytest.param([1, 2, 3, 9], 3, id="nothing_accepted"),
        pytest.param([1, 2, 3, 5, 9], 4, id="one_accepted"),
        pytest.param([1, 2, 3, 5, 6, 9], 5, id="all_accepted"),
        pytest.param([1, 2, 3, 5], 4, id="the_targets_own_token_was_drafted"),
        pytest.param([1, 2, 3, 8, 6, 9], 3, id="other_first_token_than_drafted"),
        pytest.param([1, 2, 3, 5, 8, 9], 4, id="other_second_token"),
        pytest.param([1, 2, 3, 5, 6, 7, 8, 9], 5, id="grown_beyond_the_drafts"),
    ],
)
def test_of_a_context_that_grew_the_drafts_that_it_begins_with_are_cached(
    context, num_cached
):
    holding = Holding(0, Request(), num_tokens=3, num_cached=3, fed=[5, 6])
    context = np.array(context, dtype=np.int32)
    assert holding.goes_on(context, sampled=True)
    assert holding.num_cached == num_cached
    # Later tokens are not mistaken for drafts.
    assert holding.goes_on(np.append(context, [5, 6]), sampled=True)
    assert holding.num_cached == num_cached


@pytest.mark.parametrize("context", [[1, 2, 3], [1, 2]])
def test_the_cache_of_a_context_that_sampled_and_did_not_grow_is_of_no_use(context):
    holding = Holding(0, Request(), num_tokens=3, num_cached=3, fed=[5, 6])
    assert not holding.goes_on(np.array(context), sampled=True)


def test_a_context_that_is_computed_again_goes_on_unless_it_was_rolled_back():
    """What of it was drafted is seen once it samples again."""
    holding = Holding(0, Request(), num_tokens=3, num_cached=3, fed=[5, 6])
    assert not holding.goes_on(np.array([1, 2]), sampled=False)
    assert holding.goes_on(np.array([1, 2, 3]), sampled=False)
    assert holding.goes_on(np.array([1, 2, 3, 5, 9]), sampled=False)
    assert holding.num_cached == 3
    assert holding.goes_on(np.array([1, 2, 3, 5, 9, 4]), sampled=True)
    assert holding.num_cached == 4


def test_a_context_that_was_rolled_back_before_it_drafted_again_does_not_go_on():
    holding = Holding(0, Request(), num_tokens=3, num_cached=3)
    assert holding.goes_on(np.arange(20), sampled=True)
    holding.num_cached = 12  # as many as could be fed in one step
    assert not holding.goes_on(np.arange(9), sampled=False)


def test_a_draft_caches_its_context_and_goes_on_from_there():
    holding = Holding(0, Request(), num_tokens=3, num_cached=2)
    holding.drafted(5, [6, 7])
    assert not holding.goes_on(np.arange(5), sampled=True)
    assert holding.goes_on(np.array([1, 2, 3, 4, 5, 6, 9]), sampled=True)
    assert holding.num_cached == 6
