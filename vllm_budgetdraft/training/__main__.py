"""``python -m vllm_budgetdraft.training``: trains a drafter for a target."""

import dataclasses
import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import default_collate
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PretrainedConfig,
    TrainingArguments,
    set_seed,
)

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter, save_drafter
from vllm_budgetdraft.drafter.modeling import Drafter, initialise
from vllm_budgetdraft.training.arguments import (
    DataArguments,
    DrafterArguments,
    EvictionArguments,
    ViewArguments,
)
from vllm_budgetdraft.training.data import TokenWindows, write_run_files
from vllm_budgetdraft.training.trainer import DrafterTrainer, MultiViewLoss


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (
            DrafterArguments,
            DataArguments,
            ViewArguments,
            EvictionArguments,
            TrainingArguments,
        ),
        description=__doc__,
    )
    parts = parser.parse_args_into_dataclasses(argv)
    drafter_args, data_args, view_args, eviction_args, training_args = parts
    eviction = EvictionSettings(**dataclasses.asdict(eviction_args))
    # The dataset cuts windows and knows no columns to remove.
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)

    target = AutoModelForCausalLM.from_pretrained(
        drafter_args.target, dtype=torch.bfloat16 if training_args.bf16 else None
    )
    drafter = make_drafter(drafter_args, target.config)
    drafter.config.budgetdraft = {
        "target": Path(drafter_args.target).name,
        "budgets": view_args.budgets,
        "position_mode": "absolute",
        **eviction.model_dump(),
    }
    windows = TokenWindows(
        books=data_args.books,
        continuations=data_args.continuations,
        tokenizer=AutoTokenizer.from_pretrained(drafter_args.target),
        prefix_tokens=data_args.prefix_tokens,
        continuation_tokens=data_args.continuation_tokens,
        on_policy_fraction=data_args.on_policy_fraction,
        batch_size=training_args.per_device_train_batch_size,
        seed=training_args.seed,
    )
    output = Path(training_args.output_dir)
    command = shlex.join(["python", "-m", "vllm_budgetdraft.training", *sys.argv[1:]])
    settings = [dataclasses.asdict(part) for part in parts[:-1]]
    settings.append(training_args.to_sanitized_dict())
    write_run_files(
        output, {k: v for part in settings for k, v in part.items()}, command
    )

    trainer = DrafterTrainer(
        model=MultiViewLoss(drafter, target, view_args, eviction),
        args=training_args,
        train_dataset=windows,
        data_collator=default_collate,
        tokenizer_from=drafter_args.target,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save_drafter(drafter, output, tokenizer_from=drafter_args.target)


def make_drafter(
    arguments: DrafterArguments, target_config: PretrainedConfig
) -> Drafter:
    """The drafter to train: one from a folder, or a new small Llama."""
    max_positions = target_config.max_position_embeddings
    if arguments.drafter:
        drafter = load_drafter(arguments.drafter, max_positions=max_positions)
        return drafter.train().requires_grad_(True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=target_config.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        num_key_value_heads=arguments.num_key_value_heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=target_config.rms_norm_eps,
        rope_parameters=target_config.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=target_config.bos_token_id,
        eos_token_id=target_config.eos_token_id,
        pad_token_id=target_config.pad_token_id,
    )
    drafter = Drafter(config, max_positions)
    initialise(drafter)
    return drafter


if __name__ == "__main__":
    main()
