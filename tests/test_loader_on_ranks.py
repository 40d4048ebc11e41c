"""CoresetLoader on many ranks, and resumed in the middle of an epoch."""

import multiprocessing
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gloo import on_workers
from raypkg.core.errors import Interruption, UserError
from raypkg.coresets.loader import CoresetLoader

N, C = 500, 3  # two batches of a forward pass
OPTIONS = {"rule": "gradmatch", "fraction": 70 / N, "epochs": 3, "every_epochs": 1}


class Jittered(Dataset):
    """Rows with random augmentation, which know their positions."""

    def __init__(self, n=N, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(n, 6, generator=rng), torch.randint(C, (n,), generator=rng)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"x": self.x[i] + 0.1 * torch.randn(6), "labels": self.y[i], "indices": i}


class Answers(Jittered):
    """The same rows with tokens, of which the second half are answers, as for a language model."""

    def __getitem__(self, i):
        ids = torch.arange(6) + i
        return {**super().__getitem__(i), "input_ids": ids, "labels": ids.where(torch.arange(6) >= 3, -100)}


def outputs(model, batches):
    """Rows of samples, for rules that select by them."""
    with torch.no_grad():
        return torch.cat([model(batch["x"]) for batch in batches])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, C))

    def forward(self, x):
        return self.layers(x)


def loader_of(model=None, data=None, batch_size=8, workers=0, collate=None, **options):
    loader = DataLoader(data or Jittered(), batch_size=batch_size, num_workers=workers, collate_fn=collate)
    return CoresetLoader(loader, model or Network(), **{**OPTIONS, **options})


def train(loader, model, batches=None):
    """Train on some batches or all that are left of an epoch; return their positions, inputs and weights."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for batch in loader:
        losses = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
        loader.record(losses, batch["indices"])
        optimizer.zero_grad()
        (losses * batch["weights"]).mean().backward()
        optimizer.step()
        seen.append((batch["indices"], batch["x"], batch["weights"]))
        if len(seen) == batches:
            break
    return seen


def positions(*passes):
    return torch.cat([indices for batches in passes for indices, *_ in batches]).tolist()


def picked_twice(worker, options):
    """Return the epochs' positions, and the picks and recorded losses at the beginning of a third."""
    model = Network()
    model.layers[1].running_mean += worker.rank  # buffers drift apart between ranks
    loader = loader_of(model, **options)
    epochs = []
    for epoch in range(2):
        length, batches = len(loader), []
        for batch in loader:
            loader.record(batch["indices"] % 7 + 2.0**epoch, batch["indices"])
            batches.append((batch["indices"],))
        assert len(batches) <= length
        epochs.append(batches)
    next(iter(loader))
    return epochs, loader.coreset, loader.losses


CASES = {
    "gradmatch": {},
    "craig for a target": {"rule": "craig", "balanced": False, "target": Jittered(300, seed=1)},
    "infobatch": {"rule": "infobatch", "fraction": 1.0},
    "ccs": {"rule": "ccs", "fraction": 0.2, "warm_epochs": 1, "every_epochs": 2},
    "batches of one": {"rule": "random", "batch_size": 1, "fraction": 71 / N},
    "full gradients": {"rule": "grand", "options": {"gradients": "full"}, "data": Jittered(260)},
    "rds_plus for tokens": {"rule": "rds_plus", "rows": outputs, "data": Answers(), "target": Answers(10, seed=1)},
    "ccs for tokens": {"rule": "ccs", "fraction": 0.2, "warm_epochs": 1, "every_epochs": 2, "data": Answers()},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("world", [3])  # the third rank has no batch to compute a view of
def test_ranks_pick_and_share_what_one_rank_has(options, world):
    (alone,) = on_workers(1, picked_twice, options)
    ranks = on_workers(world, picked_twice, options)
    for _, coreset, losses in ranks:
        assert coreset.indices.equal(alone[1].indices) and coreset.weights.equal(alone[1].weights)
        assert losses.equal(alone[2])
    for epoch, whole in enumerate(alone[0]):
        shares = [epochs[epoch] for epochs, *_ in ranks]
        assert len({len(share) for share in shares}) == 1
        assert sorted(positions(*shares)) == sorted(positions(whole))


def batch_means(worker, batch_size):
    loader = loader_of(batch_size=batch_size, fraction=35 / N)
    return [(len(b["x"]), (b["indices"] * b["weights"]).mean().item()) for b in loader]


def test_the_average_over_ranks_is_the_mean_over_the_whole_batch():
    (alone,) = on_workers(1, batch_means, 12)
    ranks = on_workers(3, batch_means, 4)
    assert {size for rank in ranks for size, _ in rank} == {3, 4}  # 3 does not divide a batch of 11
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert sum(mean for _, mean in shares) / 3 == pytest.approx(whole[1], rel=1e-5)


def pass_of(worker, state, batches=None):
    loader = loader_of()
    if state:
        loader.load_state_dict(state)
    return train(loader, Network(), batches), loader.state_dict()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_resumes_on_another_number_of_ranks(world):
    first = on_workers(2, pass_of, None, 2)
    rest = on_workers(world, pass_of, first[0][1])
    whole = on_workers(1, pass_of, None)
    seen = positions(*(batches for batches, _ in first + rest))
    assert sorted(seen) == sorted(positions(whole[0][0]))


def error_of(worker, changes):
    """Return the error of a rank's epoch with changes on the second one only."""
    options = dict(changes) if worker.rank else {}
    model = Network()
    if options.pop("moved", False):
        model.layers[0].weight.data += 1
    try:
        next(iter(loader_of(model, **options)))
    except UserError as error:
        return str(error)


class Broken(Jittered):
    def __getitem__(self, i):
        if i == N - 1:
            raise OSError("the disk is full")
        return super().__getitem__(i)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Jittered(N - 1)}, "samples must be equal on all ranks, not 500 on rank 0 and 499 on rank 1"),
        ({"data": Jittered(seed=3)}, "labels must be equal on all ranks"),
        ({"rule": "craig"}, "rule must be equal on all ranks, not 'gradmatch' on rank 0 and 'craig' on rank 1"),
        ({"batch_size": 9}, "batch_size must be equal on all ranks, not 8 on rank 0 and 9 on rank 1"),
        ({"moved": True}, "the sum of the model's parameters must be equal on all ranks"),
        ({"data": Broken()}, "rank 1 of 2: OSError: the disk is full"),
    ],
)
def test_ranks_that_disagree_are_refused_on_all_of_them(changes, message):
    assert all(message in error for error in on_workers(2, error_of, changes))


def die_in_the_middle(rank, folder):
    """Train, keeping each state; rank 1 dies after its third batch, and rank 0 finds out at its next epoch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    loader = loader_of()
    for number, batch in enumerate(loader):
        torch.save((batch["indices"], loader.state_dict()), folder / f"{rank}-{number}.pt")
        if rank == 1 and number == 2:
            os._exit(9)
    try:
        next(iter(loader))
    except Interruption as error:
        (folder / "error").write_text(str(error))
    os._exit(0)  # gloo's threads may abort the exit of a process whose group is broken


def test_a_dead_rank_is_an_error_and_its_epoch_resumes_without_loss(tmp_path):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=die_in_the_middle, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 9]
    assert "rank 0 of 2 lost contact with another before epoch 2" in (tmp_path / "error").read_text()
    kept = {(rank, n): torch.load(tmp_path / f"{rank}-{n}.pt") for rank in range(2) for n in range(3)}
    rest = on_workers(2, pass_of, kept[0, 2][1])
    seen = [i for indices, _ in kept.values() for i in indices.tolist()] + positions(*(batches for batches, _ in rest))
    whole = on_workers(2, pass_of, None)
    assert sorted(seen) == sorted(positions(*(batches for batches, _ in whole))) and len(set(seen)) == len(seen)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 4, 9])  # batches; an epoch has nine
@pytest.mark.parametrize("rule", ["gradmatch", "infobatch"])
def test_resumed_in_the_middle_of_an_epoch_equals_never_stopped(rule, after, workers):
    options = {"rule": rule, "fraction": {"infobatch": 1.0, "gradmatch": 70 / N}[rule], "workers": workers}
    straight = Network()
    loader = loader_of(straight, **options)
    torch.manual_seed(1)
    expected = [train(loader, straight) for _ in range(3)]

    stopped = Network()
    loader = loader_of(stopped, **options)
    torch.manual_seed(1)
    train(loader, stopped)
    before = train(loader, stopped, after)
    state, weights, rng = loader.state_dict(), stopped.state_dict(), torch.get_rng_state()

    resumed = Network()
    loader = loader_of(resumed, **options)
    resumed.load_state_dict(weights)
    loader.load_state_dict(state)
    assert loader.state_dict().keys() == state.keys()
    torch.set_rng_state(rng)
    rest = train(loader, resumed)
    assert len(rest) == len(expected[1]) - after
    last = train(loader, resumed)
    for theirs, ours in zip(expected[1] + expected[2], before + rest + last, strict=True):
        assert all(map(torch.equal, theirs, ours))
    assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))


def test_states_of_earlier_versions_load_between_epochs():
    loader = loader_of()
    list(loader)
    former = {key: value for key, value in loader.state_dict().items() if key not in ("position", "rank", "pending")}
    again = loader_of()
    again.load_state_dict(former)
    for theirs, ours in zip(loader, again, strict=True):
        assert theirs["indices"].equal(ours["indices"])


def test_a_pass_that_was_broken_off_is_followed_by_the_next_epoch():
    loader, twin = loader_of(), loader_of()
    train(loader, Network(), 2), list(twin)
    assert [b["indices"].tolist() for b in loader] == [b["indices"].tolist() for b in twin]


def shortest_first(samples):
    return torch.utils.data.default_collate(sorted(samples, key=lambda sample: sample["x"].norm()))


def test_samples_that_collation_reorders_keep_their_scores_and_weights():
    loader, twin = loader_of(collate=shortest_first, batch_size=8), loader_of(batch_size=8)
    seen, expected = list(loader), list(twin)
    assert loader.coreset.indices.equal(twin.coreset.indices)
    weight_of = dict(zip(loader.coreset.indices.tolist(), loader.coreset.weights.tolist(), strict=True))
    assert any(not a["indices"].equal(b["indices"]) for a, b in zip(seen, expected, strict=True))
    for batch in seen:
        assert batch["weights"].tolist() == [weight_of[i] for i in batch["indices"].tolist()]
        assert batch["labels"].equal(Jittered().y[batch["indices"]])
    loader.record(seen[0]["indices"].float(), seen[0]["indices"])
    assert loader.losses[seen[0]["indices"]].equal(seen[0]["indices"].float())


class Numbered(Jittered):
    def __getitem__(self, i):
        return {**super().__getitem__(i), "indices": i // 2}


def test_indices_must_be_positions():
    with pytest.raises(UserError, match="indices must be the samples' positions in the data set, not"):
        next(iter(loader_of(data=Numbered())))


def test_batches_bucketed_by_length_give_each_loss_to_its_own_sample():
    loader = loader_of()
    pool = {key: torch.cat([batch[key] for batch in loader]) for key in ("x", "indices")}
    for places in pool["x"].norm(dim=1).argsort().split(5):  # other batches than were fetched
        loader.record(pool["indices"][places] * 2.0, pool["indices"][places])
    assert loader.losses[pool["indices"]].equal(pool["indices"] * 2.0)
    assert loader.losses.isfinite().sum() == len(loader.coreset)


def test_a_data_set_whose_length_changes_is_refused():
    data = Jittered()
    loader = loader_of(data=data)
    list(loader)
    data.y = data.y[:-1]
    with pytest.raises(UserError, match="had 500 samples and now has 499: its length must not change"):
        next(iter(loader))
