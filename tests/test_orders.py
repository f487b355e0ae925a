"""The order in which ranks compute, against torch's own schedules."""

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from autopar.schedule import SCHEDULES
from autopar.solver.orders import orders, peaks
from autopar.solver.simulate import _programs


def told(action):
    return (action.computation_type.value, action.stage_index, action.microbatch_index)


def torch_actions(schedule, rank, ranks, vpp, micro):
    """What torch's class makes of a rank, without a process group: its rule alone, on an object it did not start."""
    kind = getattr(torch_schedules, SCHEDULES[schedule].torch_name)
    made = object.__new__(kind)
    made.pp_group_size, made._n_microbatches, made.n_local_stages = ranks, micro, vpp
    made._num_stages = made.num_stages = ranks * vpp
    made.number_of_rounds = max(1, micro // ranks)
    made.microbatches_per_round = micro // made.number_of_rounds
    return [action for action in made._calculate_single_rank_operations(rank) if action is not None]


def torch_order(*case):
    found = []
    for action in torch_actions(*case):
        found += action.sub_actions or (action,)
    return [told(action) for action in found]


CASES = [
    *(
        ("interleaved", p, v, m)
        for p, v, m in [(2, 2, 2), (2, 2, 6), (4, 2, 8), (4, 3, 4), (4, 2, 10), (4, 2, 3), (3, 4, 9)]
    ),
    *(("zbv", p, 2, m) for p, m in [(2, 2), (2, 3), (2, 8), (4, 4), (4, 7), (4, 16), (5, 11)]),
    *(("dualpipev", p, 2, m) for p, m in [(2, 4), (2, 9), (3, 6), (4, 8), (4, 16), (5, 12)]),
]


@pytest.mark.parametrize(("schedule", "ranks", "vpp", "micro"), CASES)
def test_ranks_compute_in_torchs_order(schedule, ranks, vpp, micro):
    for rank, order in enumerate(orders(schedule, ranks, vpp, micro)):
        assert [action[:3] for action in order] == torch_order(schedule, rank, ranks, vpp, micro)


@pytest.mark.parametrize(("schedule", "ranks", "vpp", "micro"), [("gpipe", 3, 1, 4), ("1f1b", 4, 1, 6), *CASES])
def test_every_micro_batch_is_computed_once_each_way(schedule, ranks, vpp, micro):
    for rank, order in enumerate(orders(schedule, ranks, vpp, micro)):
        assert len(set(order)) == len(order)
        for stage in {action.stage for action in order}:
            assert SCHEDULES[schedule].rank_of(stage, ranks) == rank
            kinds = {kind: [a.micro for a in order if a.kind == kind and a.stage == stage] for kind in "FBIW"}
            assert kinds["F"] == list(range(micro))
            assert sorted(kinds["B"] + kinds["I"]) == list(range(micro))
            assert sorted(kinds["I"]) == sorted(kinds["W"])


def test_what_stages_hold_at_once():
    assert peaks("none", 1, 1, 5) == ((((1, 0),),),)
    assert peaks("gpipe", 2, 1, 5) == ((((5, 0),),), (((5, 0),),))
    assert [held[0][0][0] for held in peaks("1f1b", 4, 1, 6)] == [4, 3, 2, 1]
    # Interleaved: rank 0 starts with a round on its first stage and 2(p-1) more before anything comes back.
    for vectors in peaks("interleaved", 4, 2, 8):
        assert all(waiting == 0 for vector in vectors for _, waiting in vector)
    assert max(sum(alive for alive, _ in vector) for vector in peaks("interleaved", 4, 2, 8)[0]) == 4 + 6 + 1
    # ZBV holds as much as 1F1B: 2p half-sized stages' worth on every rank, and waits for weights at the end alone.
    for vectors in peaks("zbv", 4, 2, 16):
        assert max(sum(alive for alive, _ in vector) for vector in vectors) == 8
        assert any(waiting for vector in vectors for _, waiting in vector)


@pytest.mark.parametrize(("schedule", "ranks", "vpp", "micro"), CASES)
def test_sends_and_receives_are_posted_where_torch_posts_them(schedule, ranks, vpp, micro):
    """Torch's own lowering of its tables, sends and receives included, against ours."""
    tables = {
        rank: torch_schedules._add_reduce_grad(torch_actions(schedule, rank, ranks, vpp, micro), micro)
        for rank in range(ranks)
    }
    place = SCHEDULES[schedule].rank_of
    lowered = torch_schedules._add_send_recv(tables, lambda stage: place(stage, ranks), ranks * vpp)
    for rank, program in enumerate(_programs(schedule, ranks, vpp, micro)):
        expected = []
        for action in lowered[rank]:
            expected += [(*told(one)[:2], one.microbatch_index or 0) for one in action.sub_actions or (action,)]
        found = []
        for what, action, transfers in program:
            if what == "run":
                found.append(("REDUCE_GRAD" if action.kind == "after" else action.kind, action.stage, action.micro))
            elif what == "post":
                ((kind, stage, number),) = transfers
                receives = place(stage, ranks) != rank
                at = stage + (receives if kind == "F" else -receives)
                found.append((f"{'RECV' if receives else 'SEND'}_{kind}", at, number))
        assert found == expected
