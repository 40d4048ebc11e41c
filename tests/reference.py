"""Slow twins: the same quantities from gradients that are materialised, one sample at a time, by autograd.

And images that Pillow reads without shortcuts.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from raypkg.core.seeds import generator
from raypkg.coresets.gradients import HeadView


@dataclass(frozen=True)
class Problem:
    """A linear head [W, b] and samples that it sees; logits = W h + b."""

    head: Tensor  # [C, D+1]
    features: Tensor  # [n, D]
    y: Tensor  # [n]

    @property
    def view(self) -> HeadView:
        return HeadView(logits(self.head, self.features), self.features, self.y)


def problem(
    n: int, num_classes: int = 4, width: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Problem:
    """Continuous random data: no two samples are alike. One seed gives the same numbers in every dtype."""
    rng = generator(seed, "problem", n)
    head = torch.randn(num_classes, width + 1, generator=generator(seed, "head"))
    features = torch.randn(n, width, generator=rng)
    y = torch.randint(num_classes, (n,), generator=rng)
    return Problem(head.to(dtype), features.to(dtype), y)


def logits(head: Tensor, features: Tensor) -> Tensor:
    return features @ head[:, :-1].T + head[:, -1]


def gradient(head: Tensor, features: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy with respect to the head, by autograd [C, D+1]."""
    head = head.clone().requires_grad_()
    loss = F.cross_entropy(logits(head, features), y)
    return torch.autograd.grad(loss, head)[0]


def per_sample_gradients(p: Problem) -> Tensor:
    """One backward pass per sample [n, C, D+1]."""
    samples = zip(p.features, p.y, strict=True)
    return torch.stack([gradient(p.head, h[None], label[None]) for h, label in samples])


def full_norms(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms of the gradients of all parameters, by one backward pass per sample [n]."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for sample, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(sample[None]), label[None]), parameters)
        norms.append(torch.cat([each.flatten() for each in gradients]).norm())
    return torch.stack(norms)


def ridge(atoms: Tensor, target: Tensor, lam: float) -> Tensor:
    """Least squares anew: argmin ‖Σ v_i a_i − t‖² + λ‖v‖² for atoms [m, p] and target [p]."""
    m = len(atoms)
    left = torch.cat([atoms.T, lam**0.5 * torch.eye(m, dtype=atoms.dtype)])
    right = torch.cat([target, target.new_zeros(m)])
    return torch.linalg.lstsq(left, right[:, None]).solution[:, 0]


def matching_pursuit(atoms: Tensor, target: Tensor, k: int, lam: float) -> dict[int, float]:
    """Orthogonal matching pursuit with non-negative weights on materialised atoms [n, p]: atom → weight."""
    weights: dict[int, float] = {}
    while len(weights) < k:
        residual = target - sum(v * atoms[i] for i, v in weights.items())
        correlation = {i: float(atoms[i] @ residual) for i in range(len(atoms)) if i not in weights}
        best = max(correlation, key=correlation.__getitem__)
        if correlation[best] <= 0:
            break
        weights[best] = 0.0
        while True:
            solution = dict(zip(weights, ridge(atoms[list(weights)], target, lam).tolist(), strict=True))
            blocking = {i: weights[i] / (weights[i] - v) for i, v in solution.items() if v <= 0}
            if not blocking:
                break
            first = min(blocking, key=blocking.__getitem__)
            weights = {i: w + blocking[first] * (solution[i] - w) for i, w in weights.items() if i != first}
        weights = solution
    return weights


def matching_batches(
    gradients: Tensor, batches: list[Tensor], budget: int, lam: float, target: Tensor | None = None
) -> dict[int, float]:
    """GradMatch over batches of materialised gradients [n, p]: sample → weight in mean(w · loss)."""
    target = gradients.mean(dim=0) if target is None else target
    means = torch.stack([gradients[batch].mean(dim=0) for batch in batches])
    first = list(matching_pursuit(means, target, -(-budget // len(batches[0])), lam))
    rest = sorted(set(range(len(batches))) - set(first), key=lambda b: -float(means[b] @ target))
    cut, left = [], budget
    for b in first + rest:
        cut.append(batches[b][:left].tolist())
        left -= len(cut[-1])
    cut = [batch for batch in cut if batch]
    v = matching_pursuit(torch.stack([gradients[batch].mean(dim=0) for batch in cut]), target, len(cut), lam)
    return {i: budget * v.get(b, 0.0) / len(batch) for b, batch in enumerate(cut) for i in batch}


def nonnegative_ridge(atoms: Tensor, target: Tensor, lam: float) -> Tensor:
    """Non-negative ridge regression by trying the least squares of every subset of atoms [n, p]."""
    n, best, least = len(atoms), torch.zeros(len(atoms), dtype=atoms.dtype), float(target @ target)
    for subset in map(list, chain.from_iterable(combinations(range(n), m) for m in range(1, n + 1))):
        v = torch.zeros(n, dtype=atoms.dtype)
        v[subset] = ridge(atoms[subset], target, lam)
        error = float((v @ atoms - target).square().sum() + lam * v @ v)
        if (v >= 0).all() and error < least:
            best, least = v, error
    return best


def glister(train: Problem, valid: Problem, budget: int, *, eta: float, rounds: int) -> list[int]:
    """GLISTER one sample at a time; each refresh is a backward pass at the head that was really moved."""
    gradients, chosen = per_sample_gradients(train), []
    for part in torch.arange(budget).tensor_split(min(rounds, budget)):
        moved = train.head - eta * sum((gradients[i] for i in chosen), torch.zeros_like(train.head))
        refreshed = gradient(moved, valid.features, valid.y)
        for _ in part:
            gain = {i: float((g * refreshed).sum()) for i, g in enumerate(gradients) if i not in chosen}
            chosen.append(max(gain, key=gain.__getitem__))
    return chosen


def loss_after(p: Problem, step: Tensor) -> float:
    """The mean loss with the head moved by a step [C, D+1]."""
    return float(F.cross_entropy(logits(p.head + step, p.features), p.y))


def lowest_loss(p: Problem, step: Tensor) -> float:
    """The lowest mean loss along θ − η·step, over 16 rates η a decade."""
    return min(loss_after(p, -(10 ** (i / 16)) * step) for i in range(-96, 33))


def safe_rate(valid: Problem, step: Tensor) -> float:
    """The rate η of θ − η·step: that of the curvature's bound, doubled while half of what the slope promises comes.

    No second derivative along a = step [h; 1] exceeds the variance of the two extremes of a, each with probability ½.
    """
    slope = float((gradient(valid.head, valid.features, valid.y) * step).sum())
    change = logits(step, valid.features)
    bound = float(torch.stack([torch.stack([a.max(), a.min()]).var(correction=0) for a in change]).mean())
    start, eta = loss_after(valid, torch.zeros_like(step)), slope / bound
    assert loss_after(valid, -eta * step) <= start - eta * slope / 2 + 1e-12
    while loss_after(valid, -2 * eta * step) <= start - eta * slope:
        eta *= 2
    return eta


def topk_by_validation(train: Problem, valid: Problem, budget: int) -> list[int]:
    """The textbook form of GLISTER as DeepCore computes it: the largest <∇L_val, g_i>, never refreshed."""
    aim = gradient(valid.head, valid.features, valid.y)
    gains = (per_sample_gradients(train) * aim).sum(dim=(1, 2))
    return gains.topk(budget).indices.tolist()


def taylor_greedy(
    gradients: Tensor, head: Tensor, valid: Problem, budget: int, *, eta: float = 0.01, rounds: int = 15
) -> list[int]:
    """The textbook form of GLISTER as CORDS computes it: η is the learning rate, the step a sum, refreshed r times.

    ``gradients`` are those of the samples to choose from, spelt out [n, C, D+1].
    """
    chosen: list[int] = []
    for part in torch.arange(budget).tensor_split(min(rounds, budget)):
        moved = head - eta * gradients[chosen].sum(dim=0)
        gain = (gradients * gradient(moved, valid.features, valid.y)).sum(dim=(1, 2))
        gain[chosen] = -torch.inf
        chosen += gain.topk(len(part)).indices.tolist()
    return chosen


def plain_pursuit(atoms: Tensor, target: Tensor, k: int) -> float:
    """Squared error of the textbook form of matching pursuit, as CORDS computes it.

    k steps of least squares without negative weights and without a penalty; an atom whose weight becomes 0 keeps its
    place.
    """
    chosen: list[int] = []
    weights = atoms.new_zeros(0)
    for _ in range(k):
        correlation = atoms @ (target - weights @ atoms[chosen])
        correlation[chosen] = -torch.inf
        best = int(correlation.argmax())
        if correlation[best] <= 0:
            break
        chosen.append(best)
        weights = nonnegative_least_squares(atoms[chosen], target)
    return float((weights @ atoms[chosen] - target).square().sum())


def nonnegative_least_squares(atoms: Tensor, target: Tensor) -> Tensor:
    """argmin ‖Σ v_i a_i − t‖² over v ≥ 0, by coordinate descent until nothing moves."""
    gram, aim = atoms @ atoms.T, atoms @ target
    v = torch.zeros_like(aim)
    for _ in range(2000):
        before = v.clone()
        for i in range(len(v)):
            v[i] = ((aim[i] - gram[i] @ v + gram[i, i] * v[i]) / gram[i, i]).clamp(min=0)
        if (v - before).abs().max() <= 1e-12 * v.max():
            break
    return v


def snip(model, x, y, density):
    """Share of each layer's weights among the network's most salient, by sorting |g · w| of single weights."""
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(x), y).backward()
    weights = {name: w for name, w in model.named_parameters() if w.dim() > 1}
    salient = sorted((s.item(), name) for name, w in weights.items() for s in (w.grad * w).abs().flatten())
    kept = [name for _, name in salient[-round(density * len(salient)) :]]
    return {name: kept.count(name) / w.numel() for name, w in weights.items()}


def grasp(model, x, y):
    """w ⊙ Hg of all weights with two dimensions, H the dense Hessian of the weights."""
    model = copy.deepcopy(model).train()
    weights = {name: w for name, w in model.named_parameters() if w.dim() > 1}

    def loss():
        return F.cross_entropy(model(x), y)

    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(weights.values()))])
    products = (dense_hessian(loss, list(weights.values())) @ gradient).split([w.numel() for w in weights.values()])
    return {name: w * p.view_as(w) for (name, w), p in zip(weights.items(), products, strict=True)}


def enlarged(weight, mask):
    """Each unit's weights by √(inputs / inputs that exist), one unit after another."""
    result = weight.clone()
    for unit, existing in zip(result, mask, strict=True):
        if existing.any():
            unit *= math.sqrt(existing.numel() / int(existing.sum()))
    return result


def corrected_sgd(model, batches, rate, damped, epochs):
    """AGENT's loop with a fixed γc and no momentum: the gradient of each batch, of the snapshot, and of all batches."""

    def gradient(of, batch):
        return torch.autograd.grad(F.cross_entropy(of(batch[0]), batch[1]), list(of.parameters()))

    for epoch in range(epochs):
        snapshot = copy.deepcopy(model)
        parts = [gradient(snapshot, batch) for batch in batches(epoch)]
        full = [torch.stack(part).mean(0) for part in zip(*parts, strict=True)]
        for batch in batches(epoch):
            with torch.no_grad():
                for p, g, old, mean in zip(
                    model.parameters(),
                    *(torch.enable_grad()(gradient)(of, batch) for of in (model, snapshot)),
                    full,
                    strict=True,
                ):
                    p -= rate * (g - damped * (old - mean))
    return model


def pairwise(rows: Tensor) -> Tensor:
    """Distances between rows [n, p] from their differences [n, n]."""
    return torch.stack([(rows - row).norm(dim=1) for row in rows])


def greedy_medoids(distances: Tensor, k: int, *, slack: float = 1e-12) -> list[int]:
    """Facility location by trying every row of [n, m] at every step; of equal gains the most central one's."""
    totals = distances.sum(dim=1).tolist()
    medoids = [min(range(len(totals)), key=totals.__getitem__)]
    while len(medoids) < k:
        nearest = distances[medoids].amin(dim=0)
        gains = {j: float((nearest - row).clamp(min=0).sum()) for j, row in enumerate(distances) if j not in medoids}
        top = max(gains.values())
        medoids.append(min((totals[j], j) for j, gain in gains.items() if gain >= top * (1 - slack))[1])
    return medoids


def clusters(distances: Tensor, medoids: list[int]) -> list[int]:
    """How many columns of [n, m] are nearest to each medoid."""
    nearest = [min(medoids, key=lambda j, i=i: float(distances[j, i])) for i in range(distances.shape[1])]
    return [nearest.count(j) for j in medoids]


def left_over(distances: Tensor, medoids: list[int]) -> float:
    """The facility location objective Σ_i min_{j∈S} d_ij."""
    return float(distances[medoids].amin(dim=0).sum())


def farthest_first(rows: Tensor, k: int) -> list[int]:
    """K-center greedily, from the row nearest to the mean."""
    distances = pairwise(rows)
    chosen = [int((rows - rows.mean(dim=0)).norm(dim=1).argmin())]
    while len(chosen) < k:
        apart = {i: float(distances[i, chosen].min()) for i in range(len(rows)) if i not in chosen}
        chosen.append(max(apart, key=apart.__getitem__))
    return chosen


def dense_hessian(loss, parameters) -> Tensor:
    """The whole Hessian of ``loss()`` with respect to all entries of the parameters, a row for each [p, p]."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def minibatch(logits: Tensor, y: Tensor, size: int) -> tuple[list[int], list[float]]:
    """CREST's medoids by brute force on spelt-out logit gradients, and the share of V in each one's cluster."""
    rows = (logits.double().softmax(dim=1) - F.one_hot(y, logits.shape[1])).detach()
    distances = pairwise(rows)
    medoids = greedy_medoids(distances, size, slack=1e-6)
    shares = [0.0] * size
    for row in distances[:, medoids]:
        nearest = [j for j in range(size) if row[j] <= row.min() + 1e-4]
        for j in nearest:
            shares[j] += 1 / len(nearest)
    return medoids, shares


def crest(model, x: Tensor, y: Tensor, settings, training, seed: int, size: int, r: int) -> list[float]:
    """CREST step by step as in the paper: whole pools at once, dense loops, momentum by hand; returns every ρ."""
    n, parameters = len(y), list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    active, recorded, errors = list(range(n)), {i: [] for i in range(n)}, []
    steps = training.epochs * math.ceil(n / size)
    step = updates = drops = 0
    interval, expired, first = 1, True, None
    gradients, squares = [], []

    def draw(count: int, *name) -> Tensor:
        return torch.tensor(active)[torch.randperm(len(active), generator=generator(seed, *name))[:count]]

    def vector(tensors) -> Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])

    while step < steps:
        if expired:
            updates += 1
            pool = []
            for p in range(settings.b * interval):
                subset = draw(r, "crest subset", updates, p)
                with torch.no_grad():
                    logits = model(x[subset])
                for i, loss in zip(subset.tolist(), F.cross_entropy(logits, y[subset], reduction="none"), strict=True):
                    recorded[i].append(float(loss))
                medoids, shares = minibatch(logits, y[subset], size)
                pool.append((subset[medoids], torch.tensor(shares) * size / r))
            everyone, weights = torch.cat([s for s, _ in pool]), torch.cat([w for _, w in pool])

            def loss_of_pool(everyone=everyone, weights=weights):
                return F.cross_entropy(model(x[everyone]), y[everyone], reduction="none") @ weights / len(weights)

            anchor = vector(parameters)
            gradients.append(vector(torch.autograd.grad(loss_of_pool(), parameters)))
            rng = generator(seed, "crest signs", updates, 0)
            signs = vector([torch.randint(2, p.shape, generator=rng) * 2.0 - 1 for p in parameters])
            squares.append((signs * (dense_hessian(loss_of_pool, parameters) @ signs)).square())
            weigh = [sum(b ** (len(v) - 1 - s) * (1 - b) * q for s, q in enumerate(v)) / (1 - b ** len(v))
                     for b, v in ((0.9, gradients), (0.999, squares))]  # fmt: skip
            slope, bend = weigh[0], weigh[1].sqrt()
            first = first or float(bend.norm())
            ahead = [int(torch.randint(len(pool), (), generator=generator(seed, "crest draw", step + s)))
                     for s in range(min(interval, steps - step))]  # fmt: skip
            with torch.no_grad():
                each = {p: F.cross_entropy(model(x[pool[p][0]]), y[pool[p][0]], reduction="none") @ pool[p][1] / size
                        for p in set(ahead)}  # fmt: skip
            base = float(sum(each.values())) / len(each)
        for _ in range(min(interval, steps - step)):
            chosen, weights = pool[int(torch.randint(len(pool), (), generator=generator(seed, "crest draw", step)))]
            loss = F.cross_entropy(model(x[chosen]), y[chosen], reduction="none") @ weights / size
            for p, v, g in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
                v.mul_(training.momentum).add_(g + training.weight_decay * p.detach())
                p.data.sub_(training.lr * v)
            step += 1
        subset = draw(r, "crest check", step)
        with torch.no_grad():
            losses = F.cross_entropy(model(x[subset]), y[subset], reduction="none")
        for i, loss in zip(subset.tolist(), losses, strict=True):
            recorded[i].append(float(loss))
        moved = vector(parameters) - anchor
        predicted = base + float(slope @ moved) + 0.5 * float(moved @ (bend * moved))
        errors.append(abs(predicted - float(losses.mean())) / float(losses.mean()))
        expired = errors[-1] > settings.tau
        if step // settings.exclude_every_steps > drops:
            drops = step // settings.exclude_every_steps
            stay = [i for i in active if not recorded[i] or max(recorded[i]) > settings.exclude_below]
            active = stay if len(stay) >= 2 * r else active
            recorded = {i: [] for i in range(n)}
        if expired:
            interval = math.ceil(settings.h * first / float(bend.norm()))
    return errors


def crest_each_step(model, x: Tensor, y: Tensor, training, seed: int, size: int, r: int) -> None:
    """CREST without a local model: every step draws a random subset and trains on its medoids, momentum by hand."""
    n = len(y)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(training.epochs * math.ceil(n / size)):
        subset = torch.randperm(n, generator=generator(seed, "crest subset", step + 1, 0))[:r]
        with torch.no_grad():
            medoids, shares = minibatch(model(x[subset]), y[subset], size)
        weights = torch.tensor(shares) * size / r
        chosen = subset[medoids]
        loss = F.cross_entropy(model(x[chosen]), y[chosen], reduction="none") @ weights / size
        for p, v, g in zip(model.parameters(), velocity, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            v.mul_(training.momentum).add_(g + training.weight_decay * p.detach())
            p.data.sub_(training.lr * v)


def bfgs(pairs):
    """The BFGS matrix of (s, y) pairs, oldest first, updated one by one from σI with the newest pair's σ."""
    s, y = pairs[-1]
    matrix = (s @ y) / (s @ s) * torch.eye(len(s), dtype=s.dtype)
    for s, y in pairs:
        bent = matrix @ s
        matrix = matrix - torch.outer(bent, bent) / (s @ bent) + torch.outer(y, y) / (y @ s)
    return matrix


def gradient_sum(model, split, w, indices):
    """Σ of per-sample loss gradients by autograd, one sample at a time, on standardised samples in float64."""
    model, total = model.double(), torch.zeros_like(w)
    torch.nn.utils.vector_to_parameters(w, model.parameters())
    unit = 255.0 if len(split.shape) == 3 else 1.0
    extra = (1,) * (len(split.shape) - 1)
    mean, std = (torch.tensor(part, dtype=w.dtype).view(-1, *extra) for part in (split.mean, split.std))
    for i in indices.tolist():
        x, y = split.batch([i])
        loss = torch.nn.functional.cross_entropy(model((x.double() / unit - mean) / std), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        total += torch.cat([g.flatten() for g in grads])
    return total


def message_passing(
    view: HeadView, k: int, *, neighbours: int, forward: float, reverse: float, relative: bool
) -> list[int]:
    """D2 pruning, one sample and one message at a time."""
    squares = pairwise(view.features).square()
    n = len(view)
    nearest = [
        sorted((j for j in range(n) if j != i), key=lambda j, i=i: float(squares[i, j]))[:neighbours] for i in range(n)
    ]
    unit = sum(float(squares[i, j]) for i in range(n) for j in nearest[i]) / (n * neighbours) if relative else 1.0
    errors = (view.logits.softmax(dim=1) - F.one_hot(view.y, view.num_classes)).norm(dim=1).tolist()
    scores = {
        i: errors[i] + sum(math.exp(-forward * float(squares[i, j]) / unit) * errors[j] for j in nearest[i])
        for i in range(n)
    }
    chosen: list[int] = []
    while len(chosen) < k:
        best = max(scores, key=scores.__getitem__)
        score = scores.pop(best)
        chosen.append(best)
        for j in nearest[best]:
            if j in scores:
                scores[j] -= math.exp(-reverse * float(squares[best, j]) / unit) * score
    return chosen


def image_header(data: bytes) -> tuple[int, int, bool]:
    """Height, width, and whether it is grey, as Pillow says."""
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width, image.mode == "L"


def decoded_in_full(data: bytes, side: int) -> np.ndarray:
    """All pixels, then the resize: uint8 [side, side, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        whole = image.convert("RGB")
    return np.asarray(ImageOps.fit(whole, (side, side), Image.Resampling.BILINEAR))


def turns(pool: Tensor, target: Tensor, tasks: Tensor, k: int) -> list[int]:
    """RDS+ by its words: whoever's turn it is takes its best sample that is not taken, all cosines anew."""
    cosines = F.normalize(pool.double(), dim=1) @ F.normalize(target.double(), dim=1).T
    names = tasks.unique().tolist()
    asking = [cosines[:, tasks == name].amax(dim=1) for name in names] if len(names) > 1 else [*cosines.T]
    picks: list[int] = []
    while len(picks) < k:
        scores = asking[len(picks) % len(asking)].tolist()
        free = [i for i in range(len(pool)) if i not in picks]
        picks.append(max(free, key=lambda i, scores=scores: (scores[i], -i)))
    return picks


def less_rows(model, losses, m, v, signs: Tensor) -> Tensor:
    """Gradients one sample at a time, as Adam would use them if it has moments, times a matrix of signs, of length 1.

    ``losses(parameters, i)`` is the loss of sample i; m and v are flat.
    """
    trained = {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}
    rows = []
    for i in range(losses.samples):
        found = torch.func.grad(losses)(trained, i)
        g = torch.cat([found[name].flatten() for name in trained])
        if m is not None:
            g = (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g**2 + 1e-8).sqrt()
        row = g @ signs
        rows.append(row / row.norm())
    return torch.stack(rows)


def value_gradients(model, names: list[str], x: Tensor) -> Tensor:
    """Each sample's gradient of a language model's loss with respect to some parameters, by vmap(grad) [n, p].

    x is int64 [n, 2, l] without padding; the loss is the mean over the tokens of segment 1.
    """
    parameters = dict(model.network.named_parameters())

    def loss(own, tokens, answered):
        whole = parameters | own
        logits = torch.func.functional_call(model.network, whole, (tokens[None],), {"use_cache": False}).logits[0]
        each = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        return (each * answered[1:]).sum() / answered[1:].sum()

    own = {name: parameters[name].detach() for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that vmap does in a loop
        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(own, x[:, 0], x[:, 1].float())
    return torch.cat([found[name].flatten(1).detach() for name in names], dim=1)


def losses_beside(model, names: list[str], x: Tensor, step: Tensor) -> Tensor:
    """A language model's losses [n] with a step [p] added to some of its parameters, by a whole forward pass."""
    moved = copy.deepcopy(model)
    parameters = dict(moved.network.named_parameters())
    for name in names:
        size = parameters[name].numel()
        parameters[name].data += step[:size].view_as(parameters[name])
        step = step[size:]
    with torch.no_grad():
        return moved(x).losses


def colm(gradients: Tensor, sources: list[int], size: int, first: Tensor, second: Tensor, t: int, kept: int):
    """CoLM's choice [m] at step t from materialised gradients [r, p], and the mean of those that move the averages."""
    present = sorted(set(sources))
    counts = {q: sources.count(q) for q in present}
    large = [q for q in present if counts[q] >= size / len(present)]
    room = size - sum(counts[q] for q in present if q not in large)
    exact = {q: room * counts[q] / sum(counts[q] for q in large) for q in large}
    quota = {q: math.floor(share) for q, share in exact.items()}
    for q in sorted(large, key=lambda q: quota[q] - exact[q])[: room - sum(quota.values())]:
        quota[q] += 1

    as_adam = []
    for g in gradients:
        m = (0.9 * first + 0.1 * g) / (1 - 0.9**t)
        v = (0.999 * second + 0.001 * g**2) / (1 - 0.999**t)
        as_adam.append(m / (v.sqrt() + 1e-8))
    chosen = []
    for q in present:
        members = [i for i, source in enumerate(sources) if source == q]
        if q in large and quota[q] < len(members):
            rows = torch.stack([as_adam[i] for i in members])
            biggest = sorted(range(rows.shape[1]), key=lambda c: -float(rows[:, c].abs().mean()))[:kept]
            rows = rows[:, biggest]
            distances = torch.stack([(rows - row).abs().sum(dim=1) for row in rows])
            members = [members[j] for j in greedy_medoids(distances, quota[q])]
        chosen += members
    return sorted(chosen), gradients[[i for i in chosen if sources[i] in large]].mean(dim=0)


def regularised(p: Problem, decay: float, removed: Sequence[int] = ()) -> Callable[[Tensor], Tensor]:
    """Return F(w) = mean cross-entropy + λ/2 ‖w‖² of the flattened head, without some of the samples."""
    kept = [i for i in range(len(p.y)) if i not in removed]

    def objective(w: Tensor) -> Tensor:
        z = logits(w.view_as(p.head), p.features[kept])
        return F.cross_entropy(z, p.y[kept]) + decay / 2 * w.square().sum()

    return objective


def minimum(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the minimum by Newton's method with autograd's Hessian."""
    w = start.flatten()
    for _ in range(20):
        slope = torch.autograd.functional.jacobian(objective, w)
        step = torch.linalg.solve(torch.autograd.functional.hessian(objective, w), slope)
        w = w - step
        if step.norm() < 1e-10:
            break
    return w


def averaged(states: Sequence[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average of a training's states, each number's by its weights Π over the steps; whole numbers are the last."""
    rates = [1 - min(decay, (1 + t) / (10 + t)) for t in range(1, len(states))]
    weights = [rate * math.prod(1 - later for later in rates[t + 1 :]) for t, rate in enumerate([1.0, *rates], -1)]
    return {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True))
        if value.is_floating_point()
        else value
        for name, value in states[-1].items()
    }
