"""Draft loops as graphs: captured once by batch size and length, replayed by drafts."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from vllm_budgetdraft.proposer.draft_loop import (
    FIRST_WIDTH,
    DraftInputs,
    Fed,
)
from vllm_budgetdraft.proposer.picking import Drafts, Draws

#: Picked, drawn from the whole vocabulary, or drawn from the top-k.
Kind = Literal["greedy", "drawn", "cut"]
GREEDY: Kind = "greedy"
DRAWN: Kind = "drawn"
CUT: Kind = "cut"
#: Runs a function, and returns what does its work again, on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaGraphCapture:
    """``Capture`` of CUDA graphs that share their scratch memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay


class Loop(Protocol):
    """What makes drafts by device work alone, of fixed shapes."""

    def draft(self, inputs: DraftInputs, num_drafts: int, *, validate: bool) -> Drafts:
        """See ``DraftProposer.draft``."""


class DraftGraphs:
    """One graph for each batch size of ``sizes`` and length of ``lengths``.

    A batch takes the next larger size, whose other rows draft on the cache's spare slot
    for nobody, and the next longer draft, whose end nobody reads.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        spare_slot: int,
        sizes: Sequence[int],
        lengths: Sequence[int],
        draws: bool,
        device: torch.device,
        width: int = FIRST_WIDTH,
        fed: Fed | None = None,
    ) -> None:
        """
        Args:
            sizes, lengths: ascending.
            width: tokens of a request that are fed first.
            fed: of ``sizes[-1]`` rows, for a drafter that reads features; it is kept,
                and written to.
            draws: whether there are graphs of drawn drafts besides those of greedy
                ones: of the whole vocabulary, and of a top-k.
        """
        self._loop = loop
        self._sizes, self._lengths = sizes, lengths
        self._kinds: tuple[Kind, ...] = (GREEDY, DRAWN, CUT) if draws else (GREEDY,)
        self._replays: dict[tuple[int, int, Kind], Callable[[], None]] = {}
        self._results: dict[tuple[int, int, Kind], Drafts] = {}
        self._fed = fed
        # Slot, end and last tokens of a row that drafts for nobody.
        self._idle_row = torch.tensor([spare_slot, width, *[0] * width], device=device)
        self._rows = self._idle_row.repeat(sizes[-1], 1)
        self._temperatures = torch.zeros(sizes[-1], device=device)
        self._top_k = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        shape = (lengths[-1], sizes[-1])
        self._uniforms = torch.zeros(shape, device=device)

    @torch.inference_mode()
    def capture(self, capture: Capture) -> int:
        """Captures every graph, the largest first: smaller ones fit into its memory.

        Returns:
            How many there are.
        """
        for size in reversed(self._sizes):
            for length in reversed(self._lengths):
                for kind in self._kinds:
                    self._capture(capture, size, length, kind)
        return len(self._replays)

    def _capture(self, capture: Capture, size: int, length: int, kind: Kind) -> None:
        top_k = self._top_k[:size] if kind == CUT else None
        draws = Draws(self._temperatures[:size], self._uniforms[:length, :size], top_k)
        inputs = DraftInputs(
            self._rows[:size, 0],
            self._rows[:size, 1],
            self._rows[:size, 2:],
            None if kind == GREEDY else draws,
        )
        if self._fed is not None:
            features, counts = self._fed
            inputs = inputs._replace(fed=Fed(features[:size], counts[:size]))
        key = size, length, kind

        def run() -> None:
            self._results[key] = self._loop.draft(inputs, length, validate=False)

        run()  # what is loaded or compiled at first use must not be captured
        self._replays[key] = capture(run)

    def draft(self, inputs: DraftInputs, num_drafts: int) -> Drafts:
        """Replays the graph of a draft; see ``DraftLoop.draft``."""
        batch = len(inputs.slots)
        size = _at_least(self._sizes, batch)
        length = _at_least(self._lengths, num_drafts)
        columns = (inputs.slots[:, None], inputs.ends[:, None], inputs.tokens)
        torch.cat(columns, 1, out=self._rows[:batch])
        if inputs.fed is not None and self._fed is not None:
            for buffer, given in zip(self._fed, inputs.fed, strict=True):
                buffer[:batch] = given
                buffer[batch:size] = buffer[:1]  # which is of some number
        if batch < size:
            self._rows[batch:size] = self._idle_row
        kind: Kind = GREEDY
        if inputs.draws is not None:
            temperatures, uniforms, top_k = inputs.draws
            self._temperatures[:batch] = temperatures
            self._uniforms[:num_drafts, :batch] = uniforms
            kind = DRAWN if top_k is None else CUT
            if top_k is not None:
                self._top_k[:batch] = top_k
        key = size, length, kind
        self._replays[key]()
        tokens, confidences, probabilities = self._results[key]
        return Drafts(
            tokens[:batch, :num_drafts],
            confidences[:batch, :num_drafts],
            probabilities[:batch, :num_drafts] if probabilities is not None else None,
        )


def _at_least(values: Sequence[int], value: int) -> int:
    """The smallest of ascending values that is not below ``value``."""
    return values[bisect_left(values, value)]
