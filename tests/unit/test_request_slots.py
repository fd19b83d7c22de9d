import numpy as np
import pytest

from vllm_budgetdraft.vllm_integration.request_slots import Holding, RequestSlots


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
    ("context", "goes_on"),
    [
        pytest.param([1, 2, 3, 9], True, id="nothing_accepted"),
        pytest.param([1, 2, 3, 5, 9], True, id="one_accepted"),
        pytest.param([1, 2, 3, 5, 6, 9], True, id="all_accepted"),
        pytest.param([1, 2, 3, 8, 9], False, id="other_tokens_than_drafted"),
        pytest.param([1, 2, 3, 5, 8, 9], False, id="other_second_token"),
        pytest.param([1, 2, 3, 5, 6, 7, 9], False, id="grown_beyond_the_drafts"),
        pytest.param([1, 2, 3], False, id="not_grown"),
        pytest.param([1, 2], False, id="shrunk"),
    ],
)
def test_a_context_goes_on_only_by_accepted_drafts_and_one_token(context, goes_on):
    holding = Holding(slot=0, state=Request(), num_tokens=3, drafts=[5, 6])
    assert holding.continues(np.array(context, dtype=np.int32), sampled=True) is goes_on


def test_a_request_that_has_not_drafted_yet_has_nothing_to_go_on_from():
    holding = Holding(slot=0, state=Request())
    assert not holding.continues(np.array([1, 2]), sampled=True)


def test_a_context_that_is_computed_again_goes_on_unless_it_was_rolled_back():
    """It may grow by other tokens than the old ones before it samples again."""
    holding = Holding(slot=0, state=Request(), num_tokens=3, drafts=[5, 6])
    assert holding.continues(np.array([1, 2, 3]), sampled=False)
    assert holding.continues(np.array([1, 2, 3, 5, 9]), sampled=False)
    assert not holding.continues(np.array([1, 2]), sampled=False)
