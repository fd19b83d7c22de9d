"""Examples that start vLLM, and vLLM's parser for the others."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from tests.support.processes import run_in_process
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


def printed_by(program: Path) -> str:
    sys.path.insert(0, str(program.parent))  # as where Python runs it
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        runpy.run_path(str(program), run_name="__main__")
    return printed.getvalue()


def test_vllm_takes_the_commands() -> None:
    commands = servers()
    output = run("-c", PARSE, input=json.dumps(commands))
    found = json.loads(output.splitlines()[-1])
    assert found == {name: [args[1], "budgetdraft"] for name, args in commands.items()}


@pytest.mark.parametrize("program", ["offline.py", "custom_policy.py"])
def test_outputs_are_plain_vllms(program: str) -> None:
    printed = run_in_process(printed_by, EXAMPLES / program)
    assert "equal to plain vLLM's: 4 of 4" in printed
