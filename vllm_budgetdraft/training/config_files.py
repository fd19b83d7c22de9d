"""Options of a YAML file, as words of a command line."""

import json
from pathlib import Path
from typing import Any

import yaml

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.files import read_text

PRESETS = Path(__file__).with_name("presets")


def with_config(argv: list[str]) -> list[str]:
    """The options of ``--config``, a YAML file or a preset, before all others.

    Raises:
        ConfigurationError: there is no such file, or it holds no options.
    """
    place = next((i for i, each in enumerate(argv) if _is_config(each)), None)
    if place is None:
        return argv
    _, is_joined, name = argv[place].partition("=")
    rest = argv[:place] + argv[place + (1 if is_joined else 2) :]
    if not is_joined:
        name = argv[place + 1] if place + 1 < len(argv) else ""
    preset = PRESETS / f"{name}.yaml"
    path = preset if preset.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in PRESETS.glob("*.yaml")))
        raise ConfigurationError(
            f"--config {name!r} is no file; give a YAML file, or a preset ({known})"
        )
    try:
        options = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"{path} is no YAML ({' '.join(str(error).split())}); mend it there"
        ) from error
    if not isinstance(options, dict):
        raise ConfigurationError(f"{path} holds no options; write 'name: value' lines")
    found = []
    for key, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            found += [f"--{key}", *map(_word, values)]
    return found + rest


def _is_config(word: str) -> bool:
    return word == "--config" or word.startswith("--config=")


def _word(value: Any) -> str:
    """Options that have names and values themselves are JSON, as for ``Trainer``."""
    return json.dumps(value) if isinstance(value, dict) else str(value)
