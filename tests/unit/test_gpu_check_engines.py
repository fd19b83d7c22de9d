"""Engines fail the check of a GPU for whatever it is to find, and hold otherwise."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_check import engines, rows
from benchmarks.gpu_check.engine_checks import TIE, Checks
from benchmarks.gpu_check.rows import FAILED, OK, SKIPPED, Row
from benchmarks.gpu_check.sizes import FULL, TINY
from vllm_budgetdraft.comparison.engine_process import BatchGeneration

NUM_PROMPTS = len(TINY.prompts)
GRAPHS = "INFO core_loader.py:54] BudgetDraft captured 12 CUDA graphs of its drafts"


class StubEngine:
    """Generates the same tokens ever, and says so."""

    def __init__(self, runner: str = "V1", num_accepted: int = 100) -> None:
        part = "gpu.model_runner" if runner == "V2" else "gpu_model_runner"
        self.model_runner = f"vllm.v1.worker.{part}.GPUModelRunner"
        tokens = [list(range(TINY.new_tokens)) for _ in TINY.prompts]
        self.answer = BatchGeneration(tokens, 1.0, 100, num_accepted)

    def wait_until_ready(self) -> None: ...

    def describe(self) -> dict[str, str]:
        return {"model_runner": self.model_runner}

    def generate_batch(self, prompts, sampling) -> BatchGeneration:
        assert len(prompts) == NUM_PROMPTS
        return self.answer


class DeadEngine(StubEngine):
    def wait_until_ready(self) -> None:
        raise RuntimeError("the engine stopped; its log ends:\nCUDA out of memory")

    def generate_batch(self, prompts, sampling) -> BatchGeneration:
        self.wait_until_ready()
        return super().generate_batch(prompts, sampling)


class EngineThatDies(StubEngine):
    def generate_batch(self, prompts, sampling) -> BatchGeneration:
        raise RuntimeError("the engine stopped; its log ends:\nillegal access")


def checked(gap=None, log=GRAPHS, runner="V1", is_gpu=True, **changed) -> list[Row]:
    names = ("plain", "self", "budgeted", "eager", "half")
    stubs = {name: StubEngine() for name in names} | changed
    checks = Checks(stubs, TINY, runner, gap or (lambda *_: 1.0), lambda name: log)
    return list(checks.rows(is_gpu=is_gpu))


def failed(found: list[Row]) -> dict[str, str]:
    return {row.name: row.figure for row in found if row.status == FAILED}


def with_tokens(prompt: int, index: int, token: int) -> StubEngine:
    """One that answers one prompt otherwise."""
    engine = StubEngine()
    engine.answer.token_ids[prompt][index] = token
    return engine


def test_engines_that_do_what_they_should_hold():
    found = checked()
    assert rows.all_hold(found)
    assert [row.status for row in found] == [OK] * 12
    assert "captured: self 12, budgeted 12, half 12" in found[-1].figure


def test_without_a_gpu_graphs_are_left_out_with_the_reason():
    (row,) = [row for row in checked(is_gpu=False) if row.status == SKIPPED]
    assert (row.name, row.figure) == ("V1 CUDA graphs", "there is no GPU")


@pytest.mark.parametrize("name", ["self", "budgeted", "eager"])
def test_one_other_token_is_a_failure_that_says_where(name):
    found = failed(checked(**{name: with_tokens(2, 5, 99)}))
    assert list(found) == [f"V1 {name} is greedy"]
    assert (
        f"3 of 4 prompts; otherwise after {TINY.prompts[2]} tokens (by 1)"
        in (found[f"V1 {name} is greedy"])
    )


def test_a_tie_is_none_and_the_target_is_asked_what_it_is():
    asked = []

    def gap(context: list[int], token: int, other: int) -> float:
        asked.append((len(context), context[-2:], token, other))
        return TIE / 2

    found = checked(gap, budgeted=with_tokens(1, 7, 99))
    assert rows.all_hold(found)
    assert asked == [(TINY.prompts[1] + 7, [5, 6], 7, 99)]
    assert any("3 of 4 prompts" in row.figure for row in found)


@pytest.mark.parametrize("gap", [1.01 * TIE, -1.0, float("nan")])
def test_what_is_no_tie_fails(gap):
    found = failed(checked(lambda *_: gap, budgeted=with_tokens(1, 7, 99)))
    assert list(found) == ["V1 budgeted is greedy"]


def test_most_prompts_do_not_end_in_ties():
    engine = with_tokens(0, 1, 99)
    for prompt in (1, 2):
        engine.answer.token_ids[prompt][1] = 99
    assert list(failed(checked(lambda *_: 0.0, self=engine))) == ["V1 self is greedy"]


def test_a_target_that_refuses_its_own_drafts_fails():
    found = failed(checked(self=StubEngine(num_accepted=98)))
    assert list(found) == ["V1 self accepts itself"]
    assert "98.0% of 100 drafts accepted" in found["V1 self accepts itself"]


def test_drafts_that_are_never_accepted_fail_where_some_must_be():
    found = checked(
        budgeted=StubEngine(num_accepted=0), half=StubEngine(num_accepted=0)
    )
    assert list(failed(found)) == ["V1 budgeted at temperature 1", "V1 half answers"]


def test_an_engine_that_drafts_nothing_fails():
    engine = StubEngine()
    engine.answer = replace(engine.answer, num_draft_tokens=0, num_accepted_tokens=0)
    assert "eager drafted nothing" in failed(checked(eager=engine)).values()


def test_an_answer_cut_short_fails():
    engine = StubEngine()
    engine.answer.token_ids[3].pop()
    assert "V1 half answers" in failed(checked(half=engine))


def test_a_dead_engine_fails_with_its_last_words_and_leaves_others_be():
    found = failed(checked(self=DeadEngine()))
    names = ["self starts", "self is greedy", "self accepts itself"]
    words = "RuntimeError: CUDA out of memory"
    assert found == {f"V1 {name}": words for name in names}


def test_without_plain_vllm_nothing_is_greedy():
    found = failed(checked(plain=EngineThatDies()))
    assert list(found) == [f"V1 {n} is greedy" for n in ("self", "budgeted", "eager")]
    assert set(found.values()) == {"RuntimeError: illegal access"}


def test_another_runner_than_was_asked_for_fails():
    assert list(failed(checked(eager=StubEngine("V2")))) == ["V1 eager starts"]
    assert "V2 plain starts" in failed(checked(runner="V2"))


@pytest.mark.parametrize("log", ["", GRAPHS.replace("12", "0")])
def test_no_graphs_on_a_gpu_are_a_failure(log):
    assert list(failed(checked(log=log))) == ["V1 CUDA graphs"]


def test_engines_on_a_gpu_share_it_and_keep_less_than_they_read():
    folders = {"is_gpu": True, "has_half": True, "target": "t", "drafter": "d"}
    found = engines.engine_args(FULL, **folders)
    assert list(found) == ["plain", "self", "budgeted", "eager", "half"]
    for args in found.values():
        assert args["kv_cache_memory_bytes"] and args["gpu_memory_utilization"] < 0.1
    assert found["half"]["dtype"] == "bfloat16"
    assert found["eager"]["enforce_eager"] and "enforce_eager" not in found["budgeted"]
    chunk = found["self"]["speculative_config"]["draft_prefill_chunk"]
    assert chunk >= sum(FULL.prompts)
    for sizes in (FULL, TINY):
        assert max(sizes.prompts) > sizes.kv_budget
        assert max(sizes.prompts) + sizes.new_tokens <= sizes.max_model_len


def test_the_gap_is_that_of_the_targets_logits(tmp_path):
    from transformers import LlamaForCausalLM

    target, drafter = engines.write_models(tmp_path, TINY.target)
    model = LlamaForCausalLM.from_pretrained(target)
    logits = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    gap = engines.gap_of(target)([1, 2, 3], 7, 8)
    assert gap == pytest.approx((logits[7] - logits[8]).item(), abs=1e-5)
    assert gap == -engines.gap_of(target)([1, 2, 3], 8, 7)
    shorter = LlamaForCausalLM.from_pretrained(drafter)
    assert len(shorter.model.layers) == len(model.model.layers) - 1


@pytest.mark.parametrize("sizes", [TINY, FULL])
def test_a_wrong_position_would_show_and_rounding_does_not(tmp_path, sizes):
    from transformers import LlamaForCausalLM

    target, _ = engines.write_models(tmp_path, sizes.target)
    model = LlamaForCausalLM.from_pretrained(target)
    torch.manual_seed(0)
    tokens = torch.randint(sizes.target["vocab_size"], (1, 200))
    positions = torch.arange(200)
    off_by_one = (positions + (positions >= 100))[None]
    with torch.inference_mode():
        logits = model(tokens).logits[0, 100:]
        others = model(tokens, position_ids=off_by_one).logits[0, 100:]
        exact = model.double()(tokens).logits[0, 100:]
    agree = logits.argmax(-1) == others.argmax(-1)
    assert agree.float().mean() < 0.8
    assert (logits - exact).abs().max() < TIE / 10
