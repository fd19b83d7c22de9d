"""Python runs this where its folder is on the path: also in vLLM's workers."""

from tests.support.runner_v2 import schedule_ahead

schedule_ahead()
