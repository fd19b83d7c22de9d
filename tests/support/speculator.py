"""An engine's part around the speculator of model runner V2, with no engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.drafting import build_proposer
from tests.support.models import VOCAB_SIZE, random_tokens

NUM_DRAFTS, NUM_SLOTS, MAX_MODEL_LEN = 4, 4, 1024


class Runner:
    """A runner's part: requests by index, on the device, and batches of them.

    Attributes:
        speculator: the real one, over a real proposer.
        temperature: by index.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int = VOCAB_SIZE,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        from vllm_budgetdraft.vllm_integration.v2 import (
            own_cache_speculator as runner_v2,
        )

        self.core = build_proposer(
            folder,
            num_slots=NUM_SLOTS,
            max_model_len=MAX_MODEL_LEN,
            num_speculative_tokens=NUM_DRAFTS,
            vocab_size=vocab_size,
            dtype=dtype,
            tells_logits=True,
            **{"kv_budget": 64, **settings},
        )
        self.states = SimpleNamespace(
            all_token_ids=SimpleNamespace(
                gpu=torch.zeros((NUM_SLOTS, MAX_MODEL_LEN), dtype=torch.int32)
            ),
            total_len=SimpleNamespace(gpu=torch.zeros(NUM_SLOTS, dtype=torch.int32)),
            num_computed_tokens_np=np.zeros(NUM_SLOTS, dtype=np.int32),
            req_id_to_index={},
            index_to_req_id={},
        )
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(settings=self.core.config),
            scheduler_config=SimpleNamespace(max_num_seqs=NUM_SLOTS),
            model_config=SimpleNamespace(
                max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: vocab_size
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        self.speculator = runner_v2.OwnCacheSpeculator(
            config, torch.device("cpu"), self.states
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner_v2, "load_core", lambda *_, **__: self.core)
            self.speculator.load_model(None)
        self.temperature = torch.ones(NUM_SLOTS)

    def add(self, index: int, num_tokens: int, **sampling: Any) -> None:
        self.speculator.release_ended()
        self.begin(index, random_tokens(num_tokens, seed=index), **sampling)

    def begin(
        self, index: int, tokens: torch.Tensor, scope: Any = None, **sampling: Any
    ) -> None:
        """A request of such a scope; its place in a step is given to it first."""
        name, num_tokens = f"request {index}", len(tokens)
        self.states.req_id_to_index[name] = index
        self.states.index_to_req_id[index] = name
        self.states.all_token_ids.gpu[index, :num_tokens] = tokens
        self.states.total_len.gpu[index] = num_tokens
        params = dict.fromkeys(["extra_args", "seed", "structured_outputs"])
        params |= {"temperature": 1.0, "top_k": 0}
        self.speculator.add_request(
            name,
            SimpleNamespace(
                sampling_params=SimpleNamespace(**params | sampling),
                prefill_token_ids=tokens.tolist(),
                num_computed_tokens=0,
                prompt_embeds=None,
                lora_request=None,
                mm_features=[],
                budgetdraft_told=scope,
            ),
        )

    def emit(self, index: int, tokens: list[int]) -> None:
        """What the target sampled."""
        length = int(self.states.total_len.gpu[index])
        end = length + len(tokens)
        self.states.all_token_ids.gpu[index, length:end] = torch.tensor(tokens)
        self.states.total_len.gpu[index] = end
        self.states.num_computed_tokens_np[index] = end  # at most

    def end(self, index: int) -> None:
        name = self.states.index_to_req_id.pop(index)
        del self.states.req_id_to_index[name]

    def propose(
        self, indices: list[int], num_drafts: int = 0, length: int = NUM_DRAFTS
    ) -> torch.Tensor:
        """Drafts of requests that sampled.

        Args:
            num_drafts: that each had verified.
            length: that each is to draft.
        """
        ends = self.states.total_len.gpu[indices]
        batch = SimpleNamespace(
            num_reqs=len(indices),
            idx_mapping=torch.tensor(indices),
            idx_mapping_np=np.array(indices),
            num_scheduled_tokens=np.full(len(indices), MAX_MODEL_LEN),
            num_draft_tokens_per_req=np.full(len(indices), num_drafts),
            num_computed_prefill_tokens_np=np.zeros(len(indices), dtype=np.int64),
        )
        last_sampled = torch.zeros((NUM_SLOTS, 1), dtype=torch.int64)
        last_sampled[indices, 0] = self.states.all_token_ids.gpu[
            indices, ends - 1
        ].long()
        return self.speculator.propose(
            batch,
            *(None,) * 6,
            last_sampled,
            None,
            self.temperature,
            None,
            num_speculative_tokens=length,
        )
