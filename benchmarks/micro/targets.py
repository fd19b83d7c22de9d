"""What attention has to reach, and whether rows of the report show that it does."""

from collections.abc import Sequence

from benchmarks.micro.report_file import Row

#: Share of the copy bandwidth that is due, and from which sizes on.
BANDWIDTH_SHARE, BANDWIDTH_BATCH, BANDWIDTH_BUDGET = 0.8, 64, 2048
#: Most that the longest time may exceed the shortest by, over contexts.
FLATNESS = 0.05


def time_us(measured: Row) -> float:
    """The median that counts: in a graph, where there are graphs."""
    return measured["in_graph" if "in_graph" in measured else "eager"]["p50_us"]


def bandwidth_is_due(batch: int, budget: int) -> bool:
    return batch >= BANDWIDTH_BATCH and budget >= BANDWIDTH_BUDGET


def verdicts(rows: Sequence[Row]) -> dict[str, bool | None]:
    """Whether each target is met; None if no row says.

    A row without times, because ours failed or disagreed with the reference, misses
    every target that it bears on.
    """
    bandwidth = [row for row in rows if row["kind"] == "bandwidth"]
    shares = [
        row.get("copy_bandwidth_share", 0.0) >= BANDWIDTH_SHARE
        for row in bandwidth
        if bandwidth_is_due(row["batch"], row["budget"])
    ]
    speedups = [
        row["speedup_over"]["vllm"] >= 1.0
        for row in bandwidth
        if "vllm" in row.get("speedup_over", {})
    ]
    flat = [each["spread"] <= FLATNESS for each in flatness(rows)]
    flat += [False for row in rows if row["kind"] == "context" and "error" in row]
    named = {
        "copy_bandwidth_share": shares,
        "never_slower_than_vllm": speedups,
        "flat_over_context": flat,
    }
    return {name: all(each) if each else None for name, each in named.items()}


def flatness(rows: Sequence[Row]) -> list[Row]:
    """Over contexts, by how much the longest time exceeds the shortest, as a share."""
    times: dict[tuple[str, int, int, str], list[float]] = {}
    for row in rows:
        if row["kind"] == "context" and "times" in row:
            for name, measured in row["times"].items():
                key = (row["shape"], row["batch"], row["budget"], name)
                times.setdefault(key, []).append(time_us(measured))
    return [
        dict(zip(("shape", "batch", "budget", "what"), key, strict=True))
        | {"spread": max(each) / min(each) - 1}
        for key, each in times.items()
        if len(each) > 1
    ]
