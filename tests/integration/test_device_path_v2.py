"""What an engine does on a GPU alone, on a CPU, in model runner V2.

For slow runs: it takes four minutes, and what is drafted is V1's, too.
"""

import pytest

from tests.support.device_path import goes_where_gpus_go

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_an_engine_goes_where_gpus_go():
    goes_where_gpus_go("v2")
