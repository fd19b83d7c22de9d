"""The engine's core tells the worker which requests may share a draft cache."""

from typing import Any

from vllm_budgetdraft.vllm_integration.patching import Function, wrap_method
from vllm_budgetdraft.vllm_integration.remembering import ATTRIBUTE, Told

#: Of a Scheduler, how often its prefix cache was reset.
NUM_RESETS = "budgetdraft_num_resets"


def apply(config_class: type) -> None:
    """Patches the scheduler, wherever the config is known.

    Args:
        config_class: of the speculative configs that are ours.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    def tell_scope(original: Function) -> Function:
        """Symptom: requests with another ``cache_salt``, or from before a
        ``reset_prefix_cache``, would share what the drafter keeps of contexts.

        Reason: the worker is told of neither. Remove when it is.
        """

        def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            if isinstance(self.vllm_config.speculative_config, config_class):
                num_resets = vars(self).get(NUM_RESETS, 0)
                for new in output.scheduled_new_reqs:
                    request = self.requests[new.req_id]
                    told = Told(request.cache_salt, num_resets, new.num_computed_tokens)
                    setattr(new, ATTRIBUTE, told)
            return output

        return schedule

    def count_resets(original: Function) -> Function:
        """The other half of ``tell_scope``."""

        def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
            vars(self)[NUM_RESETS] = vars(self).get(NUM_RESETS, 0) + 1
            return original(self, *args, **kwargs)

        return reset_prefix_cache

    wrap_method(Scheduler, "schedule", tell_scope)
    wrap_method(Scheduler, "reset_prefix_cache", count_resets)
