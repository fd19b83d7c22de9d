"""Fixtures shared by every test."""

from pathlib import Path

import pytest
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
