"""README says what the code does, and what was measured."""

import json
import re
from pathlib import Path

from vllm_budgetdraft.config import BudgetDraftConfig, SettledConfig
from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.eviction.catalogue import POLICIES
from vllm_budgetdraft.vllm_integration.compatibility import NEWEST, OLDEST

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DRAFTER = ROOT / "models" / "books-9m-drafter"


def test_the_settings_table_is_the_config() -> None:
    for name, field in BudgetDraftConfig.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default}`"
        assert f"| `{name}` | {default} | {field.description} |" in README


def test_every_policy_is_named() -> None:
    for name in POLICIES:
        assert f"`{name}`" in README


def test_the_supported_range_is_stated() -> None:
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    assert f"{oldest} to {newest}" in README


def test_what_is_linked_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_the_gpu_is_what_was_measured() -> None:
    folder = ROOT / "benchmarks/results/h100-2026-11"
    runs, batches = (
        json.loads((folder / f"smollm2-padded-7b-{name}.json").read_text())[kind]
        for name, kind in (("batch1", "runs"), ("batches", "batches"))
    )

    def rate(context: int, name: str) -> float:
        own = [run for run in runs if (run["c"], run["n"]) == (context, name)]
        return sum(run["tokens"] - 1 for run in own) / sum(run["d"] for run in own)

    def length(rounds: float, accepted: int) -> str:
        return f"{1 + accepted / rounds:.2f}"

    rows = []
    for context in (1024, 4096, 7600):
        plain = rate(context, "vllm")
        speedups = [
            f"{rate(context, name) / plain:.2f}x"
            for name in ("ngram:6", "draft_model:6", "ours:6")
        ]
        own = [run for run in runs if (run["c"], run["n"]) == (context, "ours:6")]
        rounds, accepted = (
            sum(run["drafts"] for run in own),
            sum(sum(run["acc"]) for run in own),
        )
        rows.append(
            [f"{context:,} tokens", f"{plain:.0f}", *speedups, length(rounds, accepted)]
        )
    for size in (4, 16, 32):
        plain, ours = (
            next(each for each in batches if (each["b"], each["n"]) == (size, name))
            for name in ("vllm", "ours:4")
        )
        seconds, own = (each["s"] - each["first"] for each in (plain, ours))
        rows.append(
            [
                f"4,096 tokens, batch of {size}",
                f"{128 * size / seconds:,.0f}",
                "",
                "",
                f"{seconds / own:.2f}x",
                length(ours["drafted"] / 4, ours["accepted"]),
            ]
        )
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if "on one H100" in line)
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start + 2 : start + 2 + len(rows)]
    ]
    assert shown == rows


def test_the_table_of_chats_is_what_was_measured() -> None:
    file = ROOT / "benchmarks/results/smollm2-2-cores/demo.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert all(row["num_runs"] == 5 and row["output_identical"] == 1 for row in results)
    kinds = ("ngram", "draft_model", "budgetdraft")
    rows, decoding = [], []
    for context in (44, 1024, 4096):
        own = {r["kind"]: r for r in results if r["context_tokens"] == context}
        ours = own["budgetdraft"]
        rows.append(
            [
                "short chat" if context == 44 else f"question about {context:,} tokens",
                f"{own['vllm']['output_throughput']:.0f}",
                *(f"{own[kind]['speedup']:.2f}x" for kind in kinds),
                f"{ours['acceptance_length']:.2f}",
            ]
        )
        decoding.append(f"{ours['decode_speedup']:.2f}")
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if "on 2 cores of a CPU" in line)
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start + 2 : start + 5]
    ]
    assert shown == rows
    assert "budgetdraft is {}, {} and {} times".format(*decoding) in README


def test_the_first_table_of_the_pages_is_what_was_measured() -> None:
    file = ROOT / "benchmarks/results/paper-2-cores/results.json"
    measured = {
        row["kind"]: row
        for row in json.loads(file.read_text(encoding="utf-8"))["results"]
        if (row["task"], row["context_tokens"]) == ("books", 4096)
        and row["num_speculative_tokens"] in (None, 8)
        and row["kv_budget"] in (None, 512)
    }
    page = ROOT / "docs/index.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "4,096 tokens of a novel" in line)
    shown = {}
    for line in lines[start + 2 : start + 6]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        kind = re.sub(r"plain |\*|`|, .*", "", name).split()[-1]
        shown[kind.replace("vLLM", "vllm")] = cells
    assert shown.keys() == {"vllm", "ngram", "draft_model", "budgetdraft"}
    for kind, (rate, speedup, decode, length, _, same) in shown.items():
        row = measured[kind]
        assert rate == f"{row['output_throughput']:.0f}"
        assert speedup == f"{row['speedup']:.2f}x"
        assert decode == f"{row['decode_speedup']:.2f}x"
        found = row["acceptance_length"]
        assert length == (f"{found:.2f}" if found else "")
        assert same == ("yes" if row["output_identical"] == 1 else "no")
    # Keys and values of one token, and how many tokens each method holds in the end.
    drafter = read_drafter_config(DRAFTER)
    heads = drafter.num_hidden_layers * drafter.num_key_value_heads
    kib = 2 * heads * drafter.head_dim * 4 / 1024
    config = SettledConfig(model=str(DRAFTER), num_speculative_tokens=8)
    assert shown["budgetdraft"][4] == f"{config.cache_capacity(8192) * kib:,.0f} KiB"
    assert shown["draft_model"][4] == f"{(4096 + 256) * kib:,.0f} KiB"
