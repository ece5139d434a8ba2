"""Several processes against a single one; what they compute is in parallel_checks.py."""

import json
import os
import subprocess
import sys
import types
from collections import defaultdict

import parallel_checks
import pytest
import torch

from modelopt_lite.kernels import AttentionRequest
from modelopt_lite.methods import MeanPoolTopK, SinkWindow, SparseSoftmax
from modelopt_lite.models.parallel import ContextParallel, exchange, shards
from modelopt_lite.plan import DENSE


def run_checks(*worlds, timeout, **environment):
    """Run all checks of so many processes; return the errors of each process by number of processes and check."""
    command = [sys.executable, parallel_checks.__file__, *map(str, worlds)]
    # A pool of threads would not survive the fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        world, name, _, error = json.loads(line)
        found[world, name].append(error)
    return found


@pytest.fixture(scope="module")
def outcomes():
    return run_checks(timeout=300, CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def outcomes_on_gpus():
    worlds = {world for world, _ in parallel_checks.CHECKS if world <= torch.cuda.device_count()}
    return run_checks(*sorted(worlds), timeout=1800)  # kernels are compiled


def assert_passed(errors, world):
    assert not any(errors), "\n".join(error for error in errors if error)
    assert len(errors) == world, "did not run, because a check before it failed"


@pytest.mark.slow
@pytest.mark.xdist_group("parallel")
@pytest.mark.parametrize(("world", "name"), parallel_checks.CHECKS, ids=lambda value: str(value))
def test_processes_agree_with_one(outcomes, world, name):
    assert_passed(outcomes[world, name], world)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.xdist_group("parallel on GPUs")
@pytest.mark.parametrize(("world", "name"), parallel_checks.CHECKS, ids=lambda value: str(value))
def test_gpus_agree_with_one(request, world, name):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    assert_passed(request.getfixturevalue("outcomes_on_gpus")[world, name], world)


PLANS = {
    "dense": DENSE,
    "2:4": SparseSoftmax(num_sink_tokens=4, dense_window_size=64).plan(),
    "blocks": MeanPoolTopK(num_sink_tokens=4).plan(),
    "window": SinkWindow().plan(),
}


def ring_of(processes, length, rank):
    """Return how one sequence is divided, as the process ``rank`` sees it."""
    segments = [[shards.Segment(0, 0, torch.arange(length))]]
    sources, runs = shards.cut(segments, length, processes, 128)
    slots, whole = sources.shape[2], {0: length}
    return shards.Shards(None, rank, 1, length, sources, runs, runs, slots, whole, whole, False, "ring")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("length", [8192, 8000])
def test_the_ring_needs_positions_for_few_queries_only(plan, length):
    """Without them the fastest kernels run; a rule that knows positions needs them everywhere."""
    nothing = torch.empty(0, 1, 64)
    nowhere = torch.empty(0, dtype=torch.int64)
    packing = (nowhere, nowhere, 0, nowhere, nowhere, 0)
    request = AttentionRequest(nothing, nothing, nothing, None, *packing, True, 1.0, None, None, PLANS[plan])
    for rank in range(4):
        mine = ring_of(4, length, rank)
        seen = 0
        for source in range(4):
            for call in exchange._calls(request, mine, source):
                for queries, keys in call.pairs:
                    # Queries are before their keys nowhere, and the same tokens, or behind all of them.
                    same = queries[:3] == keys[:3]
                    seen += keys.length * (keys.length + 1) // 2 if same else queries.length * keys.length
                    assert call.rows.start <= queries.slot
                    assert queries.slot + queries.length <= call.rows.stop
                if call.request.has_positions and plan != "window":
                    assert max(queries.length for queries, _ in call.pairs) <= 128, call.pairs
        expected = sum(position + 1 for run in mine.queries[rank] for position in range(run.first, run.end))
        assert seen == expected


def test_chunks_are_balanced_and_whole_blocks():
    for length in (1, 127, 1000, 5000):
        whole = ring_of(3, length, 0)
        covered = sorted((run.first, run.end) for runs in whole.queries for run in runs)
        assert [begin for begin, _ in covered] == [0, *(end for _, end in covered[:-1])]
        assert covered[-1][1] == length
        assert all(run.first % 128 == 0 for runs in whole.queries for run in runs)


def test_another_default_device_does_not_matter():
    """Here one that has no memory, so that nothing computes on it by mistake."""
    inputs, positions = torch.arange(80).view(2, 40), torch.arange(40).remainder(25)[None]

    mesh = types.SimpleNamespace(get_group=lambda: None, get_local_rank=lambda: 0, size=lambda: 2)
    shard = ContextParallel(mesh, "ring", 1).shard

    def local():
        found = [shard(inputs, position_ids=positions), shard(inputs, attention_mask=inputs % 80 > 3)]
        return [x[name] for x in found for name in ("input_ids", "position_ids")]

    expected = local()
    with torch.device("meta"):
        assert all(map(torch.equal, local(), expected))
