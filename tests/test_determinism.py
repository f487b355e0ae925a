"""Hundreds of searches in one process, shuffled, find what each finds as the first of a process of its own.

What a search remembers for the next is told apart by all that it depends on: cases that differ in one thing alone
(model, device, links, mesh, dtype, length, optimizer, fix) follow each other in every order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_searches import CASES, MODELS, found

TESTS = Path(__file__).parent


def fresh(*places: int, hash_seed: int = 0) -> list[str]:
    """What a new interpreter finds; sets are in another order under another ``hash_seed``, as they are here."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "fresh_searches", *map(str, places)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers


def check_shuffled(rounds: int, alone: list[str]) -> None:
    """Every case so often, in random order; of graphs that are used again and of graphs built anew in turns."""
    order = list(range(len(CASES))) * rounds
    random.Random(rounds).shuffle(order)
    models = {name: build() for name, build in MODELS.items()}
    for count, place in enumerate(order):
        answer = found(place, models if count % 2 else None)
        assert answer == alone[place], f"search {count}, case {place}, after case {order[count - 1]}: {CASES[place]}"


def test_shuffled_searches_find_what_fresh_processes_find() -> None:
    alone = fresh()
    assert len(set(alone)) == len(CASES)  # each difference between cases is seen
    assert sum(answer.startswith("nothing") for answer in alone) < 3
    check_shuffled(4, alone)


@pytest.mark.long
def test_hundreds_of_searches_find_what_fresh_interpreters_find() -> None:
    """No fork here: each case in an interpreter of its own."""
    alone = [fresh(place, hash_seed=place)[0] for place in range(len(CASES))]
    check_shuffled(200 // len(CASES), alone)
