"""Fixtures shared by every test."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is first imported, which nothing before this line does.
    os.environ["TRITON_INTERPRET"] = "1"
# Threads that wait for each other actively crawl where anything else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from transformers import PreTrainedModel

from tests.support import models


@pytest.fixture(scope="session")
def drafter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with 3 layers and 2 KV heads."""
    return models.write_model(tmp_path_factory.mktemp("drafter"), models.llama())


@pytest.fixture(scope="session")
def hugging_face_drafter(drafter_folder: Path) -> PreTrainedModel:
    """The model of ``drafter_folder`` in ``transformers``."""
    return models.read_model(drafter_folder)
