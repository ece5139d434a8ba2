"""Several processes against a single one; what they compute is in parallel_checks.py."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import parallel_checks
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parallel")]


@pytest.fixture(scope="module")
def outcomes():
    """Run all checks once; return the errors of all processes by number of processes and check."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a pool of threads would not survive the fork
    command = [sys.executable, parallel_checks.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        world, name, _, error = json.loads(line)
        found[world, name].append(error)
    return found


@pytest.mark.parametrize(("world", "name"), parallel_checks.CHECKS, ids=lambda value: str(value))
def test_processes_agree_with_one(outcomes, world, name):
    errors = outcomes[world, name]
    assert len(errors) == world
    assert not any(errors), "\n".join(error for error in errors if error)
