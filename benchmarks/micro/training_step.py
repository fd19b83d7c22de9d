"""A training step against the straightforward one: every view a whole forward pass.

python -m benchmarks.micro.training_step --output benchmarks/results/training-step.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_budgetdraft import provenance
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.model import MultiViewModel
from vllm_budgetdraft.training.objectives import kl_loss
from vllm_budgetdraft.training.views import PrefixViews, View, continuation_hidden

METHODS = ("ours", "straightforward")


def straightforward(
    drafter: Drafter, target: torch.nn.Module, window: Tensor, continuation: int
) -> Tensor:
    """Two forward passes over the window, with logits of all of it; the same loss."""
    prefix = window[:, :-continuation]
    with torch.no_grad():
        log_p = target(window).logits[:, -continuation:].float().log_softmax(-1)
    policy = make_policy(ViewSettings())
    losses = []
    for budget in (None, 512):
        if budget is None:
            (hidden,) = continuation_hidden(drafter, window, [View([], [], 0)])
            logits = drafter.logits(hidden)[:, -continuation:]
        else:
            found = PrefixViews(  # again, and with gradients
                drafter,
                policy,
                prefix,
                ViewSettings(),
                continuation_tokens=continuation,
            )
            view = found.sparse(budget)
            tokens = window[:, -continuation:]
            (hidden,) = continuation_hidden(drafter, tokens, [view])
            logits = drafter.logits(hidden)
        losses.append(kl_loss(logits.float().log_softmax(-1), log_p).mean())
    return losses[0] + 0.5 * losses[1]


def run(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the peak memory of this process in MiB."""
    torch.manual_seed(0)
    window_tokens = args.prefix_tokens + args.continuation_tokens
    drafter = load_drafter(args.drafter, max_positions=window_tokens)
    drafter.train().requires_grad_(True)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16)
    model = MultiViewModel(
        drafter,
        target,
        ViewArguments(budgets=[512], budget_weights=[1.0]),
        ObjectiveArguments(objective="kl"),
        ViewSettings(),
    )
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    for _ in range(1 + args.steps):
        window = torch.randint(4, 4000, (args.batch_size, window_tokens))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            if args.method == "ours":
                continuation = window[:, args.prefix_tokens :]
                counted = torch.ones_like(continuation, dtype=torch.bool)
                prefix = window[:, : args.prefix_tokens]
                indices = torch.arange(len(window))
                loss = model(indices, prefix, continuation, counted)["loss"]
            else:
                loss = straightforward(
                    drafter, target, window, args.continuation_tokens
                )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_mib": peak,
        "peak_over_models_mib": peak - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="models/books-9m")
    parser.add_argument("--drafter", default="models/books-9m-drafter")
    parser.add_argument("--prefix-tokens", type=int, default=3840)
    parser.add_argument("--continuation-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    parser.add_argument("--method", choices=METHODS)
    args = parser.parse_args()
    if args.method:  # in a process of its own, whose peak is its own
        print(json.dumps(run(args)))
        return
    begun = provenance.collect(vars(args))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(args.rounds):
        for name in METHODS:
            command = [sys.executable, "-m", "benchmarks.micro.training_step"]
            done = subprocess.run(
                [*command, *sys.argv[1:], "--method", name],
                check=True,
                capture_output=True,
                text=True,
            )
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    tokens = args.batch_size * (args.prefix_tokens + args.continuation_tokens)
    results = []
    for name, found in rows.items():
        row = {key: statistics.median(each[key] for each in found) for key in found[0]}
        row |= {"method": name, "tokens_per_second": tokens / row["seconds"]}
        results.append(row)
        print(
            f"{name:<16}{row['tokens_per_second']:>8.0f} tok/s  peak over the models "
            f"{row['peak_over_models_mib']:.0f} MiB"
        )
    if args.output:
        document = {"results": results, "provenance": begun}
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
