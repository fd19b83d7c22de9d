"""``transformers.Trainer`` of a ``MultiViewModel``."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from vllm_budgetdraft.drafter.checkpoint import WEIGHTS, keep_layers_alone
from vllm_budgetdraft.drafter.draft_vocabulary import FILE
from vllm_budgetdraft.errors import ConfigurationError, TrainingError
from vllm_budgetdraft.files import whole_folder

logger = logging.get_logger(__name__)

#: What a full disk is told by: the system, PyTorch and safetensors have their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class DrafterTrainer(Trainer):
    """Trains a ``MultiViewModel``; its checkpoints are drafter folders."""

    def __init__(
        self,
        *args: Any,
        tokenizer_from: str,
        run_files: dict[str, str],
        measure: Callable[[Path], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            run_files: names and contents, written beside every checkpoint.
            measure: what ``evaluate`` finds of a drafter's folder, by name.
        """
        self._skips = SkipBadSteps()
        super().__init__(*args, **kwargs, callbacks=[self._skips])
        self._tokenizer_from = tokenizer_from
        self._run_files, self._measure = run_files, measure

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        own = {**self.model.metrics, "skipped_steps": self._skips.count}
        super().log({**logs, **own}, *args, **kwargs)

    def evaluate(
        self, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> dict[str, float]:
        """What ``measure`` finds of the drafter as it is now."""
        assert self._measure is not None
        metrics: dict[str, float] = {}
        folder = Path(self.args.output_dir) / "being_evaluated"
        self.save_drafter(folder)
        if self.is_world_process_zero():
            metrics = self._measure(folder)
            shutil.rmtree(folder)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        metrics = _from_first_rank(metrics)
        self.log(metrics)
        control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.control: TrainerControl = control
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # Windows are random by themselves, and know which step they belong to.
        return SequentialSampler(train_dataset or self.train_dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except WRITE_ERRORS as error:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            if not _is_full(error):
                raise
            raise TrainingError(
                f"no space left on the disk of {self.args.output_dir} for {folder.name}"
                f" ({error}), which was removed; free some and go on with "
                "--resume_from_checkpoint true, or keep fewer with --save_total_limit"
            ) from error

    def save_drafter(self, folder: Path, *, layers_alone: bool = False) -> None:
        """The drafter as it is served, whole or not at all.

        Every rank calls this, the first one writes.
        """
        state = self.accelerator.get_state_dict(self.model)
        if not self.is_world_process_zero():
            return
        try:
            with whole_folder(folder) as made:
                self._write(made, state, torch.bfloat16)
                if layers_alone:
                    keep_layers_alone(made)
                has_vocabulary = (made / FILE).is_file()
            # What an earlier run left would be read as if it were this one's.
            if layers_alone:
                (folder / WEIGHTS).unlink(missing_ok=True)
            if not has_vocabulary:
                (folder / FILE).unlink(missing_ok=True)
        except WRITE_ERRORS as error:
            if not _is_full(error):
                raise
            raise TrainingError(
                f"no space left on the disk of {folder} for the drafter ({error}); "
                "free some and go on with --resume_from_checkpoint true"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self._write(folder, state_dict or self.model.state_dict(), torch.float32)

    def _write(self, folder: Path, state: dict[str, Any], dtype: torch.dtype) -> None:
        state = {name.removeprefix("drafter."): x for name, x in state.items()}
        self.model.save_drafter(folder, state, dtype, self._tokenizer_from)
        for name, text in self._run_files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints have a file of their own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        (model or self.model).load_drafter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("the best checkpoint is %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class SkipBadSteps(TrainerCallback, ExportableState):
    """Leaves out a step whose gradients are not finite, says so, and counts it.

    Checkpoints keep the count.
    """

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        stored = state.stateful_callbacks[type(self).__name__]
        self.count = stored["attributes"]["count"]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        norm = gradient_norm(kwargs["model"])
        if torch.isfinite(norm):
            return
        kwargs["optimizer"].zero_grad(set_to_none=True)  # which then leaves all as is
        self.count += 1
        logger.warning(
            "step %d: the gradient's norm is %s; the step is skipped, %d so far",
            state.global_step + 1,
            norm.item(),
            self.count,
        )


def gradient_norm(model: nn.Module) -> Tensor:
    """Of every rank's gradients together, summed: finite on all ranks or on none."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(own)
    if torch.distributed.is_initialized():  # FSDP's ranks hold different parts
        torch.distributed.all_reduce(norm)
    return norm


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [p.parent for p in output.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """``--resume_from_checkpoint true`` is the newest complete one.

    Raises:
        ConfigurationError: there is none, or not the one that is named.
    """
    asked: str | None = arguments.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ConfigurationError(
                f"--resume_from_checkpoint {asked} holds no trainer_state.json: it was "
                "not written to its end; name another, or 'true' for the newest one"
            )
        return asked
    newest = last_checkpoint(Path(arguments.output_dir))
    if newest is None:
        raise ConfigurationError(
            f"--resume_from_checkpoint true: {arguments.output_dir} holds no complete "
            "checkpoint; leave the option out to begin"
        )
    return str(newest)


def how_to_go_on(output: Path) -> str:
    """After an interruption."""
    if newest := last_checkpoint(output):
        return (
            f"{newest} is complete: go on from it with the same options and "
            "--resume_from_checkpoint true"
        )
    return (
        f"{output} holds no complete checkpoint: the same options begin anew; with a "
        "lower --save_steps there are some sooner"
    )


def _is_full(error: Exception) -> bool:
    """Of a disk, a quota or a limit on the size of a file."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    told = any(f"os error {number})" in str(error) for number in full)
    return getattr(error, "errno", None) in full or told or "No space" in str(error)


def _from_first_rank(metrics: dict[str, float]) -> dict[str, float]:
    if not torch.distributed.is_initialized():
        return metrics
    shared = [metrics]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
