"""The same selections in the straightforward way: with the gradient of every sample spelt out, [n, C·(D+1)]."""

import time

import torch
from torch.nn import functional as F

import reference
from raypkg.core.seeds import generator


def gradients(view):
    """One row per sample, float32."""
    rows = torch.empty(len(view), view.logits.shape[1], view.features.shape[1] + 1)
    errors = view.logits.softmax(dim=1) - F.one_hot(view.y, view.logits.shape[1])
    torch.mul(errors[:, :, None], view.features[:, None, :], out=rows[:, :, :-1])
    rows[:, :, -1] = errors
    return rows.flatten(1)


def el2n(view, k):
    errors = view.logits.softmax(dim=1) - F.one_hot(view.y, view.logits.shape[1])
    return errors.norm(dim=1).topk(k).indices, torch.ones(k)


def grand(view, rows, k):
    return rows.norm(dim=1).topk(k).indices, torch.ones(k)


def glister(view, rows, k, eta=0.01, rounds=20):
    """Each refresh is a backward pass at the head that was really moved."""
    chosen = torch.empty(0, dtype=torch.int64)
    for part in torch.arange(k).tensor_split(rounds):
        step = (-eta * rows[chosen].sum(dim=0)).view(view.logits.shape[1], -1).requires_grad_()
        F.cross_entropy(view.logits + reference.logits(step, view.features), view.y).backward()
        gain = (rows @ step.grad.flatten()).index_fill(0, chosen, -torch.inf)
        chosen = torch.cat([chosen, gain.topk(len(part)).indices])
    return chosen, torch.ones(k)


def kcenter(view, k):
    """Farthest first over the full matrix of distances in feature space."""
    distances = torch.cdist(view.features, view.features)
    chosen = [int((view.features - view.features.mean(dim=0)).norm(dim=1).argmin())]
    while len(chosen) < k:
        chosen.append(int(distances[:, chosen].min(dim=1).values.argmax()))
    return torch.tensor(chosen), torch.ones(k)


def gradmatchpb(view, rows, k, batch_size=32):
    label = int(view.y[0])
    batches = torch.randperm(len(rows), generator=generator(0, "select", label)).split(batch_size)
    weights = reference.matching_batches(rows, list(batches), k, lam=0.5)
    return torch.tensor(list(weights)), torch.tensor(list(weights.values()))


def gradmatch(rows, sizes, lam=0.5):
    """Yield, for each size k, the seconds until there, the picks and w: least squares anew at every step."""
    start, target = time.perf_counter(), rows.mean(dim=0)
    chosen, v = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for k in sizes:
        while len(chosen) < k:
            correlation = (rows @ (target - v @ rows[chosen])).index_fill(0, chosen, -torch.inf)
            chosen, v = torch.cat([chosen, correlation.argmax()[None]]), torch.cat([v, torch.zeros(1)])
            solution = reference.ridge(rows[chosen], target, lam)
            while (solution <= 0).any():
                share = (v / (v - solution)).nan_to_num(0.0).where(solution <= 0, torch.inf)
                first = share.argmin()
                v = v + share[first] * (solution - v)
                rest = torch.arange(len(v)) != first
                chosen, v = chosen[rest], v[rest]
                solution = reference.ridge(rows[chosen], target, lam)
            v = solution
        yield time.perf_counter() - start, chosen, k * v


def craig(rows, sizes):
    """Yield, for each size k, the seconds until there, the picks and w: plain greedy over all distances."""
    start = time.perf_counter()
    distances = torch.cdist(rows, rows)
    nearest, chosen = distances.max(dim=0).values, []
    for k in sizes:
        while len(chosen) < k:
            best = int(torch.minimum(distances, nearest).sum(dim=1).argmin())
            chosen.append(best)
            nearest = torch.minimum(nearest, distances[best])
        yield time.perf_counter() - start, torch.tensor(chosen), torch.ones(k)


PLAIN = {"el2n": el2n, "kcenter": kcenter}  # need no gradients
METHODS = {"glister": glister, "gradmatchpb": gradmatchpb, "grand": grand}
GROWTHS = {"gradmatch": (gradmatch, (1, 3)), "craig": (craig, (0, 1))}  # and the powers of k in their seconds
