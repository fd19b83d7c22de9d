"""The drafter that reads vLLM's cache, over a cache laid out as vLLM's, by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from budgetdraft_kernels import reference
from tests.support import models
from tests.support.flex_twin import NUM_LAYERS, random_drafter, twin_logits
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.training.flexdraft import target_states

pytestmark = pytest.mark.vllm

PAGE_SIZE, NUM_PAGES, HEAD_SIZE = 8, 64, 10
NUM_DRAFTS = 4
MAX_MODEL_LEN, NUM_SLOTS = 128, 4
PROMPT_TOKENS = 50


class Cache:
    """A target whose attention layers have vLLM's cache of a CPU.

    Attributes:
        target: what a ``TargetCacheDrafting`` takes for vLLM's model.
    """

    def __init__(self) -> None:
        self.model = models.random_model(models.llama())
        kv_heads = self.model.config.num_key_value_heads
        shape = (NUM_PAGES, kv_heads, PAGE_SIZE, 2 * HEAD_SIZE)
        self.layers = []
        for layer in self.model.model.layers[-NUM_LAYERS:]:
            layer.self_attn.attn = SimpleNamespace(
                kv_cache=torch.full(shape, 7.0),
                head_size=HEAD_SIZE,
                kv_cache_dtype="auto",
                isa="vec",
            )
            self.layers.append(layer.self_attn.attn)

    def write(self, context: list[int], blocks: np.ndarray) -> None:
        """All but the last token, which is the bonus token."""
        _, keys, values = target_states(
            self.model, torch.tensor([context[:-1]]), NUM_LAYERS
        )
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            flat = layer.kv_cache.view(NUM_PAGES, -1, 2, PAGE_SIZE * HEAD_SIZE)
            for position in range(len(context) - 1):
                block = int(blocks[position // PAGE_SIZE])
                cell = position % PAGE_SIZE
                flat[block, :, 0, cell::PAGE_SIZE] = k[0, :, position]
                first = cell * HEAD_SIZE
                flat[block, :, 1, first : first + HEAD_SIZE] = v[0, :, position]


class State:
    """vLLM's object for a request."""

    def __init__(self, num_prompt_tokens: int, **extra_args: Any) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.sampling_params = SimpleNamespace(
            extra_args=extra_args,
            temperature=0.0,
            top_k=0,
            seed=None,
            structured_outputs=None,
        )


@pytest.fixture
def cache() -> Cache:
    return Cache()


def drafter_of(cache: Cache, num_kinds: int = 1, **settings: Any) -> Any:
    from vllm_budgetdraft.vllm_integration.target_cache import bind_to_target
    from vllm_budgetdraft.vllm_integration.v1.target_cache_drafting import (
        TargetCacheDrafting,
    )

    config = SettledConfig(
        model="",
        num_speculative_tokens=NUM_DRAFTS,
        **{
            "kv_budget": 24,
            "local_tokens": 8,
            "recent_window": 36,
            **settings,
        },
    )
    own = random_drafter(cache.model, sees_bonus=True, chains=True)
    core = MaskProposer(
        own,
        cache.model,
        config,
        reference,
        num_slots=NUM_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        seed=0,
    )
    core.warm_up_head()
    bind_to_target(core, num_kinds)
    core.warm_up()
    return TargetCacheDrafting(core, NUM_SLOTS)


def request(
    cache: Cache, row: int, num_tokens: int, state: State, **changes: Any
) -> Any:
    from vllm_budgetdraft.vllm_integration.v1.drafting import Request

    context = models.random_tokens(num_tokens, seed=row).tolist()
    # Pages of requests lie between each other, and backwards.
    blocks = np.arange(NUM_PAGES - 1 - row, -1, -4)
    cache.write(context, blocks)
    return Request(
        **{
            "row": row,
            "request_id": f"request {row}",
            "state": state,
            "context": np.array(context),
            "sampled": True,
            "max_drafts": NUM_DRAFTS,
            "block_tables": (blocks,),
            **changes,
        }
    )


def expected(
    cache: Cache,
    drafter: Any,
    each: Any,
    seen: Tensor | None,
) -> list[int]:
    context = each.context.tolist()
    own = drafter._core.drafter
    logits = twin_logits(cache.model, own, context[:-1], context[-1], NUM_DRAFTS, seen)
    return logits.argmax(-1).tolist()


def seen_of(cache: Cache, drafter: Any, each: Any, budget: int, window: int) -> Tensor:
    """[layers, G, n]: chosen pages of the prompt, and the last ones after it."""
    context = torch.tensor(each.context[:-1])
    prompt = context[: each.state.num_prompt_tokens]
    _, keys, _ = target_states(cache.model, prompt[None], NUM_LAYERS)
    visible = torch.stack(
        [drafter._core.loop.lists.selector.visible(k, budget)[0] for k in keys]
    )
    more = len(context) - len(prompt)
    seen = torch.cat([visible, visible.new_ones(*visible.shape[:2], more)], -1)
    # The prompt's last page goes on in the output.
    prompt_end = -(-len(prompt) // PAGE_SIZE) * PAGE_SIZE
    last = -(-len(context) // PAGE_SIZE)
    oldest = max(prompt_end, (last - window // PAGE_SIZE) * PAGE_SIZE)
    seen[..., prompt_end:oldest] = False
    assert not seen.all()
    return seen


@pytest.mark.parametrize("generated", [0, 3, 20, 60])
def test_a_batch_drafts_as_defined(cache, generated):
    """One request within its budget, one beyond, one that asks for a smaller one."""
    drafter = drafter_of(cache, recent_window=40)
    requests = [
        request(cache, 0, 20, State(19)),
        request(cache, 1, PROMPT_TOKENS + 1 + generated, State(PROMPT_TOKENS)),
        request(cache, 2, 31, State(30, kv_budget=17)),
    ]
    drafts = drafter.draft(requests)
    seen = [
        None,
        seen_of(cache, drafter, requests[1], 24, 40),
        seen_of(cache, drafter, requests[2], 17, 40),
    ]
    for each, view in zip(requests, seen, strict=True):
        assert drafts[each.row] == expected(cache, drafter, each, view)


def test_what_was_chosen_of_a_prompt_stays_when_its_pages_move(cache):
    drafter = drafter_of(cache)
    state = State(PROMPT_TOKENS)
    before = request(cache, 1, PROMPT_TOKENS + 1, state)
    first = drafter.draft([before])
    for layer in cache.layers:
        layer.kv_cache.fill_(7.0)
    moved = np.arange(2, NUM_PAGES, 3)
    cache.write(before.context.tolist(), moved)
    after = request(cache, 1, PROMPT_TOKENS + 1, state, block_tables=(moved,))
    for layer in cache.layers:  # only where they are now
        others = np.setdiff1d(np.arange(NUM_PAGES), moved)
        layer.kv_cache[others] = 7.0
    assert drafter.draft([after]) == first


def test_keep_all_sees_everything(cache):
    drafter = drafter_of(cache, eviction_policy="keep_all")
    each = request(cache, 0, 120, State(PROMPT_TOKENS))
    assert drafter.draft([each]) == {0: expected(cache, drafter, each, None)}


def test_requests_get_what_they_ask_for(cache):
    drafter = drafter_of(cache)
    requests = [
        request(cache, 0, 20, State(19, num_speculative_tokens=0)),
        request(cache, 1, 20, State(19, num_speculative_tokens=2)),
        request(cache, 2, 20, State(19), max_drafts=3),
        request(cache, 3, 20, State(19), sampled=False),
    ]
    drafts = drafter.draft(requests)
    assert {row: len(tokens) for row, tokens in drafts.items()} == {1: 2, 2: 3}
    for each in requests[1:3]:
        whole = expected(cache, drafter, each, None)
        assert drafts[each.row] == whole[: len(drafts[each.row])]


def test_drawn_drafts_come_with_their_distributions(cache):
    drafter = drafter_of(cache)
    drawn, greedy = request(cache, 0, 20, State(19)), request(cache, 1, 30, State(29))
    drawn.state.sampling_params.temperature = 0.7
    seen = []
    for _ in range(30):
        drafts = drafter.draft([drawn, greedy])
        seen.append(drafts[0][0])
        ids, probabilities = drafter.probabilities
    assert ids == ["request 0", "request 1"]
    assert probabilities.shape == (2, NUM_DRAFTS, models.VOCAB_SIZE)
    context = drawn.context.tolist()
    logits = twin_logits(
        cache.model,
        drafter._core.drafter,
        context[:-1],
        context[-1],
        NUM_DRAFTS,
        forced=[context[-1], *drafts[0]],
    )
    torch.testing.assert_close(
        probabilities[0], (logits / 0.7).softmax(-1), rtol=1e-3, atol=1e-4
    )
    assert len(set(seen)) > 1, "they are drawn anew"
    drafter.draft([greedy])
    assert drafter.probabilities is None


def test_drafts_are_of_the_likeliest_that_a_request_asks_for(cache):
    drafter = drafter_of(cache)
    requests = [request(cache, row, 20 + row, State(19)) for row in range(3)]
    for each, (temperature, top_k) in zip(
        requests, [(1.0, 2), (0.0, 2), (1.0, 0)], strict=True
    ):
        each.state.sampling_params.temperature = temperature
        each.state.sampling_params.top_k = top_k
    drafter.draft(requests)
    _, probabilities = drafter.probabilities
    counts = (probabilities > 0).sum(-1)
    for row, count in enumerate((2, 1, models.VOCAB_SIZE)):
        assert counts[row].tolist() == [count] * NUM_DRAFTS


def test_a_request_whose_cache_is_broken_drafts_no_more(cache):
    drafter = drafter_of(cache)
    sound = request(cache, 0, 20, State(19))
    broken = request(cache, 1, 20, State(19))
    alone = drafter.draft([sound])
    blocks = torch.from_numpy(broken.block_tables[0][:2].copy())
    cache.layers[1].kv_cache[blocks] = torch.nan
    assert drafter.draft([sound, broken]) == alone
    assert drafter._faults.num_faults == 1
    cache.write(broken.context.tolist(), broken.block_tables[0])
    assert drafter.draft([sound, broken]) == alone, "it is not tried again"
    assert drafter._faults.num_faults == 1
    drafter.forget_ended({"request 0": sound.state})
    again = request(cache, 1, 20, State(19))
    assert set(drafter.draft([sound, again])) == {0, 1}


def test_an_unknown_layout_is_said(cache):
    cache.layers[0].isa = "amx"
    with pytest.raises(UnsupportedVllmError, match="a layout that flexdraft does"):
        drafter_of(cache)
    cache.layers[0].isa = "vec"
    cache.layers[0].kv_cache_dtype = "fp8"
    with pytest.raises(UnsupportedVllmError, match="use kv_cache_dtype='auto'"):
        drafter_of(cache)
    cache.layers[0].kv_cache_dtype = "auto"
    with pytest.raises(UnsupportedVllmError, match="2 kinds of cache"):
        drafter_of(cache, num_kinds=2)


def test_a_failure_of_no_request_is_met_three_times_at_most(cache, monkeypatch):
    drafter = drafter_of(cache)
    met = request(cache, 0, 20, State(19))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(drafter._core, "draft", fail)
    for _ in range(6):
        try:
            assert drafter.draft([met]) == {}
        except Exception as error:
            drafter.reset(error)
    assert drafter._faults.num_faults == 3
