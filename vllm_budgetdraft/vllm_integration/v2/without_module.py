"""What model runner V2 asks of a speculator whose drafter is no module of vLLM's."""

from typing import Any

from torch import nn
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

#: The first arguments of ``propose``, in their order.
GIVEN = (
    *("input_batch", "attn_metadata", "slot_mappings", "last_hidden_states"),
    *("aux_hidden_states", "num_sampled", "num_rejected"),
)


class SpeculatorWithoutModule(DraftModelSpeculator):
    """It has no attention layers of vLLM's, nor whatever hangs on them."""

    model = None
    supports_mm_inputs = False
    enable_adaptive_verification = False
    draft_watermarker = None
    pcp_manager = None
    dcp_size = 1

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        raise NotImplementedError("the drafter is no module of vLLM's")

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """Drafting has no part in vLLM's attention."""

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Graphs were captured with the model, where their memory is counted."""

    def capture(self, *args: Any) -> None:
        """See ``init_cudagraph_manager``."""

    def observe_verification(self, *args: Any) -> None:
        """For estimators of acceptance, which there are none of."""
