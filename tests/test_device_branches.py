"""Whatever only a GPU does is listed here, with a test that does it on a CPU.

A place is a function, class or module that asks where it runs, or calls what a GPU
alone has. A new one fails here until somebody has written its test, for which
``tests.support.fake_gpu`` has what a GPU has. Whether that test goes there is for its
author to see: this one sees that it exists.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.test_import_boundaries import ROOT, source_files

#: An engine, whose twin of model runner V2 lies beside it, and the rest.
ENGINES = "integration/test_device_path_v1.py::test_an_engine_goes_where_gpus_go"
SMALL = "unit/test_where_gpus_go.py::"
TOGETHER = "unit/test_engines_together.py::"
BACKEND = "unit/test_attention_backend.py::"
PACKED = "unit/test_packed_attention.py::"
READER = "unit/test_prompt_reader.py::"
MASKS = "unit/test_mask_proposer.py::"
ROUNDS = "unit/test_flex_rounds.py::"
AUTO = BACKEND + "test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu"
CUT = SMALL + "test_kernels_are_cut_as_was_chosen_for_the_gpu"
TOOK = SMALL + "test_an_engine_says_what_it_took_of_the_gpu"

OURS = "vllm_budgetdraft"
SEAM = f"{OURS}.vllm_integration"
BRANCHES = {
    "kernels.budgetdraft_kernels.launch_settings.multiprocessors": CUT,
    "kernels.budgetdraft_kernels.launch_settings.settings_of": CUT,
    f"{OURS}.attention.backend": AUTO,
    f"{OURS}.attention.backend.default_device": SMALL
    + "test_a_machine_with_a_gpu_has_that_for_its_device",
    f"{OURS}.attention.backend.is_gpu": AUTO,
    f"{OURS}.attention.backend.select_operations": AUTO,
    f"{OURS}.attention.packed._causal_blocks": PACKED
    + "test_torch_attends_on_a_gpu_as_on_a_cpu",
    f"{OURS}.attention.packed.select_packed_attention": PACKED
    + "test_where_xformers_does_not_run_torch_does",
    f"{OURS}.comparison.engines.running": TOGETHER
    + "test_on_a_cpu_the_others_start_when_the_first_has_compiled",
    f"{OURS}.comparison.measure.measure": TOGETHER
    + "test_each_length_is_warmed_up_where_code_is_made_for_it",
    f"{OURS}.comparison.engines._environment": TOGETHER
    + "test_on_a_cpu_compiled_code_comes_from_the_cache_that_works",
    f"{OURS}.comparison.methods.default_kinds": SMALL
    + "test_plain_vllm_is_measured_without_its_head_start_where_it_has_one",
    f"{OURS}.comparison.notes.notes": SMALL
    + "test_results_of_a_gpu_do_not_speak_of_cpus",
    f"{OURS}.comparison.room.Need.of": TOGETHER
    + "test_on_a_cpu_the_cache_is_what_vllm_is_told",
    f"{OURS}.comparison.room.memory_at_hand": SMALL
    + "test_engines_share_the_memory_of_the_gpu",
    f"{OURS}.comparison.room.side_by_side": TOGETHER
    + "test_on_a_gpu_vllm_is_told_its_cache_and_a_share_that_is_free",
    f"{OURS}.diagnosis.env._backend": SMALL
    + "test_env_names_the_gpu_and_what_runs_on_it",
    f"{OURS}.diagnosis.env._gpu": SMALL + "test_env_names_the_gpu_and_what_runs_on_it",
    f"{OURS}.flexdraft.proposer.MaskProposer.warm_up": MASKS
    + "test_graphs_draft_what_the_loop_drafts",
    f"{OURS}.proposer.draft_graphs.CudaGraphCapture.__call__": ENGINES,
    f"{OURS}.proposer.snapshots.SnapshotStore.keep": "unit/test_snapshots.py::"
    + "test_on_a_gpu_nothing_waits_until_somebody_asks",
    f"{OURS}.proposer.snapshots._to_host": "unit/test_snapshots.py::"
    + "test_on_a_gpu_nothing_waits_until_somebody_asks",
    f"{OURS}.proposer.draft_graphs.CudaGraphCapture.__init__": ENGINES,
    f"{OURS}.proposer.prompt_reader.PromptReader._select": READER
    + "test_on_a_gpu_a_choice_is_not_looked_at_and_cannot_leave_the_prompt",
    f"{OURS}.proposer.warm_up.warm_up": ENGINES,
    f"{OURS}.proposer.memory.packs_matrices": "unit/test_packing.py::"
    "test_check_bills_what_will_be_packed",
    f"{OURS}.proposer.memory.resolve_dtype": SMALL
    + "test_drafters_have_the_targets_type_on_a_gpu",
    f"{SEAM}.core_loader.finish_core": MASKS
    + "test_a_gpu_captures_graphs_once_the_cache_is_there",
    f"{SEAM}.core_loader.load_core": ENGINES,
    f"{OURS}.comparison.engine_process._describe": TOOK,
    f"{OURS}.comparison.engine_process._when_idle": TOOK,
    f"{OURS}.flexdraft.page_lists.PageLists.__init__": MASKS
    + "test_graphs_draft_what_the_loop_drafts",
    f"{OURS}.flexdraft.proposer.MaskProposer.capture_graphs": MASKS
    + "test_a_gpu_captures_graphs_once_the_cache_is_there",
    f"{SEAM}.core_loader.load_mask_core": MASKS
    + "test_a_gpu_holds_memory_for_graphs_until_they_are_captured",
    f"{SEAM}.speculative_config._check_flexdraft": ROUNDS
    + "test_a_target_of_graphs_takes_no_masks_along",
    f"{SEAM}.flex_rounds.rounds_for": ROUNDS
    + "test_a_target_of_graphs_takes_no_masks_along",
    f"{SEAM}.metrics.observation.CoreObserver.__init__": ENGINES,
    f"{SEAM}.metrics.observation.CoreObserver.observe": ENGINES,
    f"{SEAM}.metrics.observation.DraftTimer.__init__": ENGINES,
    f"{SEAM}.metrics.observation.DraftTimer.measure": ENGINES,
    f"{SEAM}.patches.worker.expand_every_type.expand_batch_to_tokens": ENGINES,
    f"{SEAM}.patches.worker.verify_seeded_and_padded.rejection_sample": ENGINES,
    f"{SEAM}.target_cache.pages_of": SMALL
    + "test_the_targets_cache_is_read_in_every_layout_of_a_gpu",
}

DEVICE_TYPES = {"cuda", "cpu"}
ATTRIBUTES = {"is_cuda", "is_cpu", "pin_memory"}
KEYWORDS = {"pin_memory", "non_blocking"}
NAMES = {"is_gpu", "GPU_TYPES"}


def asks_for_a_gpu(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
            return True
        case ast.Attribute(attr=name) if name in ATTRIBUTES:
            return True
        case ast.Name(id=name) if name in NAMES:
            return True
        case ast.keyword(arg=name) if name in KEYWORDS:
            return True
        case ast.Compare(left=left, comparators=others):
            return any(map(_tells_devices_apart, [left, *others]))
    return False


def _tells_devices_apart(compared: ast.AST) -> bool:
    """By their type, or by what operations run there."""
    match compared:
        case ast.Constant(value=str() as name):
            return name in DEVICE_TYPES
        case ast.Name(id="reference"):
            return True
    return False


def places_in(node: ast.AST, path: str) -> Iterator[str]:
    """Names of the innermost functions, classes and modules that ask for a GPU."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from places_in(child, f"{path}.{child.name}")
        elif asks_for_a_gpu(child):
            yield path
        else:
            yield from places_in(child, path)


def test_every_branch_of_gpus_is_listed_and_no_other():
    found = set()
    for file in source_files():
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found.update(places_in(ast.parse(file.read_text(encoding="utf-8")), name))
    new, gone = found - BRANCHES.keys(), BRANCHES.keys() - found
    assert not new, f"write a test that goes there on a CPU, and list it: {new}"
    assert not gone, f"take these off the list: {gone}"


@pytest.mark.parametrize("node_id", sorted(set(BRANCHES.values())))
def test_its_test_exists(node_id):
    file, _, name = node_id.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}


@pytest.mark.parametrize(
    "line",
    [
        "if x.device.type == 'cuda': pass",
        "y = 1 if x.is_cuda else 2",
        "torch.cuda.Event()",
        "y = x.pin_memory()",
        "y.copy_(x, non_blocking=True)",
        "if is_gpu(x.device): pass",
        "while operations is not reference: pass",
        "if 'cpu' != kind: pass",
    ],
)
def test_the_list_would_miss_none_of_these(line):
    source = f"class A:\n    def f(self, x):\n        def g():\n            {line}\n"
    assert list(places_in(ast.parse(source), "m")) == ["m.A.f.g"]


@pytest.mark.parametrize("line", ["y = x.device", "z = 'cuda' if y else 'cpu'"])
def test_what_asks_nothing_is_no_branch(line):
    assert not list(places_in(ast.parse(line), "m"))
