"""Runs of a few steps, from the command line, and what they leave."""

import json
from pathlib import Path

from tests.support.books import write_books, write_target
from vllm_budgetdraft.training.__main__ import main


def write_inputs(folder: Path) -> Path:
    """A target, books, and leaflets too short for a window."""
    write_target(folder / "target")
    write_books(folder / "books.jsonl")
    write_books(folder / "leaflets.jsonl", num_words=10)
    return folder


def run_options(inputs: Path, output: Path, steps: int) -> list[str]:
    arguments = f"""
        --target {inputs / "target"} --texts {inputs / "books.jsonl"}
        --hidden_size 48 --intermediate_size 64 --num_hidden_layers 2
        --num_attention_heads 6 --num_key_value_heads 2
        --prefix_tokens 40 --continuation_tokens 24
        --budgets 24 32 --budget_weights 0.5 0.5 --local_tokens 16
        --per_device_train_batch_size 8 --learning_rate 0.02 --max_steps {steps}
        --lr_scheduler_type constant --logging_steps 1 --save_steps 2
        --report_to none --disable_tqdm true --use_cpu --output_dir {output}
    """
    return arguments.split()


def train(inputs: Path, output: Path, *more: str, steps: int) -> None:
    main([*run_options(inputs, output, steps), *more])


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(checkpoint: Path) -> list[float]:
    return [entry["loss"] for entry in history(checkpoint) if "loss" in entry]
