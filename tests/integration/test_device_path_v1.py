"""What an engine does on a GPU alone, on a CPU, in model runner V1."""

import pytest

from tests.support.device_path import goes_where_gpus_go

pytestmark = pytest.mark.vllm


def test_an_engine_goes_where_gpus_go():
    goes_where_gpus_go("v1")
