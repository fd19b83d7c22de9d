"""``budgetdraft check`` as a user runs it."""

import os
import subprocess
import sys

import pytest

from tests.support.engines import DRAFTER, TARGET

pytestmark = pytest.mark.vllm

#: Of the lines that it prints.
NAMES = {
    *("checking", "target", "vocabulary", "drafted", "positions", "memory"),
    *("runner", "engines", "measuring", "speed-up", "acceptance", "outputs"),
}


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }
    return subprocess.run(
        [sys.executable, "-m", "vllm_budgetdraft", "check", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_a_pair_that_fits_is_described_and_measured() -> None:
    done = check(
        *(TARGET, DRAFTER, "--seconds", "30", "--context-tokens", "300"),
        *("--new-tokens", "24"),
        "--engine-args",
        '{"dtype": "float32", "enforce_eager": true, "max_num_seqs": 8}',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(
        line.split(maxsplit=1)
        for line in done.stdout.replace("model runner", "runner").splitlines()
        if line.partition(" ")[0] in NAMES
    )
    assert said.keys() == NAMES
    for engine in ("vllm", "budgetdraft"):
        assert f"{engine} is ready after" in done.stdout
    assert "vllm, budgetdraft: loading and compiling" in done.stdout
    assert said["measuring"].startswith("prompt ")
    assert said["drafted"].startswith("all 4096 tokens: the output matrix is 54%")
    assert said["vocabulary"] == "4096 tokens in both, of equal tokenizers"
    assert said["positions"].startswith("absolute, within the 16384 tokens")
    assert "(8 requests x 784 tokens" in said["memory"]
    assert "prompts of 300 tokens, 24 new ones" in said["speed-up"]
    assert 2 < float(said["acceptance"].split()[0]) < 9
    assert said["outputs"] == "equal, token for token"


def test_a_pair_that_does_not_fit_is_refused_in_one_line(drafter_folder) -> None:
    done = check(TARGET, str(drafter_folder))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("budgetdraft: the drafter's vocab")
    assert "Traceback" not in done.stderr
