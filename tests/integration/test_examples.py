"""Examples that start vLLM, as users run them, and vLLM's parser for the others."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_examples import EXAMPLES, servers

pytestmark = pytest.mark.vllm

#: Reads command lines as ``vllm`` does, and prints what stays of the settings.
PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
found = {}
for name, arguments in json.load(sys.stdin).items():
    args = parser.parse_args(arguments)
    found[name] = [args.model_tag, args.speculative_config["method"]]
print(json.dumps(found))
"""


def run(*command: str, **more: str) -> str:
    """What it prints, from a process of its own."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {
            # One process, which is sooner up.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
        },
        **more,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_vllm_takes_the_commands() -> None:
    commands = servers()
    output = run("-c", PARSE, input=json.dumps(commands))
    found = json.loads(output.splitlines()[-1])
    assert found == {name: [args[1], "budgetdraft"] for name, args in commands.items()}


@pytest.mark.parametrize("program", ["offline.py", "custom_policy.py"])
def test_outputs_are_plain_vllms(program: str) -> None:
    assert "equal to plain vLLM's: 4 of 4" in run(str(EXAMPLES / program))
