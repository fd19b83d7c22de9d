"""``python -m vllm_budgetdraft.training``: trains a drafter for a target.

    python -m vllm_budgetdraft.training --config run.yaml --max_steps 100

A config holds options by name; those of the command line come after, and win. The paper
(https://arxiv.org/abs/2606.00144) is ``--config paper``.
"""

import dataclasses
import json
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import distributed
from torch.utils.data import default_collate
from transformers import (
    HfArgumentParser,
    PretrainedConfig,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from vllm_budgetdraft.command_line import told, when_interrupted, with_homes
from vllm_budgetdraft.config import ViewSettings, valid
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.errors import ConfigurationError, short
from vllm_budgetdraft.files import claimed, write_text
from vllm_budgetdraft.flexdraft.checkpoint import fingerprint
from vllm_budgetdraft.training.arguments import (
    AcceptanceArguments,
    DataArguments,
    DrafterArguments,
    FeatureArguments,
    FlexDraftArguments,
    ObjectiveArguments,
    ViewArguments,
    ViewSettingsArguments,
)
from vllm_budgetdraft.training.config_files import with_config
from vllm_budgetdraft.training.drafters import (
    choose_draft_vocabulary,
    load_target,
    make_drafter,
    make_flexdraft,
    read_target,
)
from vllm_budgetdraft.training.eagle3 import FeatureModel
from vllm_budgetdraft.training.flexdraft import FlexDraftModel
from vllm_budgetdraft.training.heads import check_head, make_head
from vllm_budgetdraft.training.held_out import held_out_acceptance
from vllm_budgetdraft.training.inputs import (
    cut_windows,
    read_inputs,
    windows_per_step,
)
from vllm_budgetdraft.training.model import MultiViewModel
from vllm_budgetdraft.training.model_card import model_card
from vllm_budgetdraft.training.teacher_cache import TeacherCache
from vllm_budgetdraft.training.trainer import (
    DrafterTrainer,
    checkpoint_to_resume,
    how_to_go_on,
)

logger = logging.get_logger(__name__)

PARTS = (
    DrafterArguments,
    FlexDraftArguments,
    FeatureArguments,
    DataArguments,
    ViewArguments,
    ObjectiveArguments,
    ViewSettingsArguments,
    AcceptanceArguments,
    TrainingArguments,
)


def main(argv: list[str] | None = None) -> None:
    """Runs it; a user's mistake ends it with status 2 and no traceback."""
    with told("budgetdraft train"):
        train(sys.argv[1:] if argv is None else argv)


def train(argv: list[str]) -> None:
    """
    Raises:
        ConfigurationError, UnsupportedDrafterError: what was asked for is impossible.
        TrainingError: the run cannot go on.
    """
    parts = _parse(argv)
    arguments = parts[-1]
    output = Path(arguments.output_dir)
    with ExitStack() as stack:
        if arguments.process_index == 0:  # ranks write to one folder
            stack.enter_context(claimed(output))
        stack.enter_context(when_interrupted(lambda: how_to_go_on(output)))
        _train(argv, parts)
    if distributed.is_initialized():
        # Its threads abort the process where they outlive the interpreter.
        distributed.destroy_process_group()


def _parse(argv: list[str]) -> tuple[Any, ...]:
    parser = HfArgumentParser(PARTS, description=__doc__)
    try:
        words = with_homes(with_config(argv))
        parts: tuple[Any, ...] = parser.parse_args_into_dataclasses(words)
    except ValueError as error:  # of TrainingArguments
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"the options cannot be taken ({short(error)}); change what that names"
        ) from error
    return parts


def _train(argv: list[str], parts: tuple[Any, ...]) -> None:
    (
        drafter_args,
        flexdraft,
        features,
        data,
        views,
        objective,
        seen,
        acceptance,
        arguments,
    ) = parts
    view = valid(ViewSettings, dataclasses.asdict(seen), "settings of the view")
    # Windows have columns that no model's signature names.
    arguments.remove_unused_columns = False
    arguments.ddp_find_unused_parameters = False
    if arguments.data_seed is None:
        arguments.data_seed = arguments.seed
    set_seed(arguments.seed)

    target_config, tokenizer = read_target(drafter_args.target)
    window = max(data.prefix_tokens) + data.continuation_tokens
    _check_window(window, target_config, data, objective)
    if views.sparse_weight and min(views.budgets) >= max(data.prefix_tokens):
        logger.warning(
            "no sparse view is trained: the smallest of budgets=%s holds the longest "
            "of prefix_tokens=%s whole",
            views.budgets,
            data.prefix_tokens,
        )
    if arguments.max_steps <= 0:
        raise ConfigurationError(
            f"max_steps={arguments.max_steps}: windows are drawn without end; say "
            "after how many steps to stop"
        )
    is_head = drafter_args.drafter_type == "eagle3"
    if is_head:
        check_head(drafter_args, features, data, objective, acceptance)
    # All of the data is looked at before anything large is loaded.
    inputs = read_inputs(data, tokenizer, target_config.vocab_size)
    windows = cut_windows(inputs, data, arguments)
    checkpoint = checkpoint_to_resume(arguments)
    draft_ids = choose_draft_vocabulary(
        drafter_args, checkpoint, inputs, tokenizer, target_config.vocab_size
    )
    target = load_target(drafter_args.target, arguments)
    learnt = {
        "target": Path(drafter_args.target).name,
        "budgets": views.budgets,
        "objective": objective.objective,
        **view.model_dump(),
    }
    options = {k: v for part in parts[:-1] for k, v in dataclasses.asdict(part).items()}
    run = arguments.to_sanitized_dict()
    run["windows_per_step"] = windows_per_step(arguments)
    run_files = {
        "run.json": json.dumps(options | run, indent=2) + "\n",
        "train_command.txt": shlex.join(
            ["python", "-m", "vllm_budgetdraft.training", *argv]
        )
        + "\n",
    }
    model: MultiViewModel | FlexDraftModel
    if drafter_args.drafter_type == "flexdraft":
        _check_flexdraft(data, view, objective, flexdraft)
        settings = {
            "target": learnt["target"],
            "fingerprint": fingerprint(target),
            "draft_tokens": objective.draft_tokens,
            "budgetdraft": learnt,
        }
        model = FlexDraftModel(
            make_flexdraft(drafter_args, flexdraft, target, window),
            target,
            views,
            objective,
            view,
            flexdraft,
            settings,
        )
    else:
        has_embedding = False
        drafter: Drafter
        if is_head:
            drafter, has_embedding = make_head(
                drafter_args, features, checkpoint, target, draft_ids, window
            )
        else:
            drafter = make_drafter(drafter_args, target, window)
        if view.position_mode == "absolute":  # those of the whole window are learnt
            native = drafter.config.max_position_embeddings
            drafter.config.max_position_embeddings = max(native, window)
        _check_native_range(drafter.config.max_position_embeddings, data, views, view)
        drafter.config.budgetdraft = learnt
        if isinstance(drafter, FeatureDrafter):
            model = FeatureModel(
                drafter,
                target,
                views,
                objective,
                view,
                features,
                with_embedding=has_embedding,
            )
        else:
            cache = _cache(objective, drafter_args, data, arguments, target.config)
            model = MultiViewModel(
                drafter, target, views, objective, view, cache, draft_ids
            )
    held_out = held_out_acceptance(
        target,
        tokenizer,
        acceptance,
        data,
        view,
        model.drafter.config,
        flexdraft.selection_page_size if isinstance(model, FlexDraftModel) else None,
    )
    is_measured_on_the_way = arguments.eval_strategy != "no"
    if is_measured_on_the_way:
        if held_out is None:
            raise ConfigurationError(
                "eval_strategy is set, but neither eval_conversations nor eval_texts "
                "is; give held-out conversations or texts"
            )
        _keep_best(arguments)

    trainer = DrafterTrainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        eval_dataset=[] if held_out else None,  # which is not asked
        data_collator=default_collate,
        tokenizer_from=drafter_args.target,
        run_files=run_files,
        measure=held_out.measure if held_out else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    output = Path(arguments.output_dir)
    trainer.save_drafter(output, layers_alone=drafter_args.layers_alone)
    if held_out and not is_measured_on_the_way:
        trainer.evaluate()  # for the model card
    if trainer.is_world_process_zero():
        card = model_card(
            model.drafter,
            learnt["target"],
            options | run,
            trainer.state,
            model.num_drafted,
        )
        write_text(output / "README.md", card)


def _check_window(
    window: int,
    target: PretrainedConfig,
    data: DataArguments,
    objective: ObjectiveArguments,
) -> None:
    if window > target.max_position_embeddings:
        raise ConfigurationError(
            f"prefix_tokens={data.prefix_tokens} and continuation_tokens="
            f"{data.continuation_tokens} make windows of {window} tokens, beyond the "
            f"target's {target.max_position_embeddings} (max_position_embeddings); "
            "shorten them"
        )
    if objective.position_weights != "uniform" and (
        data.continuation_tokens % objective.draft_tokens
    ):
        raise ConfigurationError(
            f"continuation_tokens={data.continuation_tokens} is no multiple of "
            f"draft_tokens={objective.draft_tokens}, whose positions have weights "
            "together; change one of them"
        )


def _check_native_range(
    native: int, data: DataArguments, views: ViewArguments, view: ViewSettings
) -> None:
    """Of cache_relative positions; absolute ones are learnt of the whole window."""
    if view.position_mode == "absolute":
        return
    if view.draft_prefill != "streaming":
        raise ConfigurationError(
            "position_mode='cache_relative' is for prompts of any length, which are "
            f"read with draft_prefill='streaming', not {view.draft_prefill!r}; train "
            "with that"
        )
    room = native - data.continuation_tokens
    if (longest := min(max(views.budgets), max(data.prefix_tokens))) > room:
        raise ConfigurationError(
            f"position_mode='cache_relative': a budget of {longest} tokens, and "
            f"continuation_tokens={data.continuation_tokens} after it, leave the "
            f"{native} positions that the drafter was made for "
            "(max_position_embeddings); lower budgets, or shorten the continuation"
        )


def _cache(
    objective: ObjectiveArguments,
    drafter: DrafterArguments,
    data: DataArguments,
    arguments: TrainingArguments,
    target: PretrainedConfig,
) -> TeacherCache | None:
    if objective.teacher_cache is None:
        return None
    per_step = windows_per_step(arguments)
    return TeacherCache(
        Path(objective.teacher_cache),
        num_windows=per_step * arguments.max_steps,
        positions=data.continuation_tokens,
        width=target.hidden_size,
        windows={
            "target": drafter.target,
            "windows_per_step": per_step,
            "seed": arguments.data_seed,
            **dataclasses.asdict(data),
        },
    )


def _check_flexdraft(
    data: DataArguments,
    view: ViewSettings,
    objective: ObjectiveArguments,
    flexdraft: FlexDraftArguments,
) -> None:
    blind = flexdraft.blind_fraction
    if not 0 <= blind <= 1 or (blind and not flexdraft.sees_bonus):
        raise ConfigurationError(
            f"blind_fraction={blind} with sees_bonus={flexdraft.sees_bonus}: it is the "
            "share, from 0 to 1, of drafts that are not told the bonus token where "
            "others are; leave it out, or set sees_bonus"
        )
    if view.position_mode != "absolute" or view.draft_prefill != "full":
        raise ConfigurationError(
            f"position_mode={view.position_mode!r} and draft_prefill="
            f"{view.draft_prefill!r}: flexdraft reads the target's own cache, which "
            "is 'absolute' and 'full'; leave both out"
        )
    if objective.draft_tokens >= data.continuation_tokens:
        raise ConfigurationError(
            f"draft_tokens={objective.draft_tokens} do not fit in continuation_tokens="
            f"{data.continuation_tokens}; lengthen the continuation"
        )
    if objective.teacher_cache is not None:
        raise ConfigurationError(
            "teacher_cache keeps hidden states, and flexdraft needs the target's keys "
            "and values too; leave it out"
        )


def _keep_best(arguments: TrainingArguments) -> None:
    """In the end the drafter is the one with the longest acceptance length.

    Each that is measured is saved, for any of them may be the best.
    """
    arguments.load_best_model_at_end = True
    arguments.save_strategy = arguments.eval_strategy
    arguments.save_steps = arguments.eval_steps
    if arguments.metric_for_best_model in (None, "loss"):
        arguments.metric_for_best_model = "acceptance_length"
        arguments.greater_is_better = True


if __name__ == "__main__":
    main()
