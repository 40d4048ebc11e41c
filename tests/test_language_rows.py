"""Rows of language models: gradients, projections and embeddings against their slow twins, and the rules on them."""

import json
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import reference
from measured import in_fresh_process
from raypkg import select
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.per_sample import adapter_gradients
from raypkg.coresets.record import Rows
from raypkg.coresets.rules import coreset
from raypkg.methods.language.api import Moments, Projection, less_rows, moments_of, over_checkpoints, state_rows


@pytest.fixture(scope="module")
def adapted():
    """A Llama of width 32 with adapters that are not at their start, in double precision."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, attn_implementation="eager", **sizes)
        )
        config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(network, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    return model.double().eval()


X = torch.randint(64, (5, 9), generator=generator(0, "tokens"))


def losses_of(network, x):
    logits = network(input_ids=x).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(dim=1)


class OneLoss:
    """The loss of one sample as a function of the adapters."""

    samples = len(X)

    def __init__(self, model):
        self.model = model

    def __call__(self, parameters, i):
        x = X[i : i + 1] if isinstance(i, int) else i[None]
        logits = functional_call(self.model, parameters, (), {"input_ids": x}).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean()


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_gradients_of_adapters_are_those_of_one_sample_at_a_time(adapted):
    found = adapter_gradients(adapted, lambda: losses_of(adapted, X))
    weights = {name: weight.detach() for name, weight in trained(adapted).items()}
    each = vmap(grad(OneLoss(adapted)), in_dims=(None, 0))(weights, X)
    expected = torch.cat([each[name].flatten(1) for name in weights], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-10)
    assert all(weight.grad is None for weight in adapted.parameters())


class Twice(nn.Module):
    """A layer with a bias that is used twice, at once on vectors and on sequences of them, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.idle = nn.Linear(2, 2)
        self.frozen = nn.Linear(4, 1).requires_grad_(False)

    def forward(self, x):  # [b, t, 4]
        return self.frozen(self.layer(self.layer(x).tanh().mean(dim=1))).squeeze(1)


def test_a_layer_used_twice_has_the_sum_and_an_idle_one_zeros():
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    found = adapter_gradients(model, lambda: model(x).square())
    for i in range(3):
        gradients = torch.autograd.grad(model(x[i : i + 1]).square().sum(), [*model.layer.parameters()])
        expected = torch.cat([*(each.flatten() for each in gradients), torch.zeros(6, dtype=torch.float64)])
        torch.testing.assert_close(found[i], expected)


class Tied(nn.Module):
    """A linear layer that shares the weight of an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), r"linear layers only, and 1\.weight is none: train adapters"),
        (nn.Linear(2, 2).requires_grad_(False), "Linear has no trained parameter"),
        (Tied(), r"linear layers only, and embedding.weight is none"),
    ],
)
def test_models_without_adapters_are_refused(model, problem):
    with pytest.raises(UserError, match=problem):
        adapter_gradients(model, lambda: model(torch.ones(1, 2)).sum(1))


def test_a_layer_that_mixes_the_samples_is_refused():
    layer, x = nn.Linear(3, 1, bias=False), torch.ones(2, 4, 3)
    with pytest.raises(UserError, match="weight computes 8 rows of 2 samples: freeze it"):
        adapter_gradients(layer, lambda: layer(x.flatten(0, 1)).view(2, 4).sum(1))


def signs_of(projection, size):
    return (projection(torch.eye(size)) * projection.width**0.5).round()


def test_rows_of_less_are_preconditioned_projected_gradients_of_length_1(adapted):
    size = sum(weight.numel() for weight in trained(adapted).values())
    projection = Projection(3, 24)
    signs = signs_of(projection, size).double()
    rng = generator(0, "moments")
    m, v = torch.randn(size, generator=rng).double(), torch.rand(size, generator=rng).double() * 1e-4
    parts = [each.split([weight.numel() for weight in trained(adapted).values()]) for each in (m, v)]
    moments = {name: Moments(*pair) for name, pair in zip(trained(adapted), zip(*parts, strict=True), strict=True)}
    for given, flat in ((moments, (m, v)), (None, (None, None))):
        found = less_rows(adapted, [{"input_ids": X, "labels": X}], projection, given)
        expected = reference.less_rows(adapted, OneLoss(adapted), *flat, signs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_moments_are_adams_and_no_other_optimizers(adapted):
    weights = list(trained(adapted).values())
    adam = torch.optim.AdamW(weights, lr=0.0)
    losses_of(adapted, X).mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in trained(adapted).items()}
    adam.step()
    adam.zero_grad()
    for name, moments in moments_of(adapted, adam).items():
        torch.testing.assert_close(moments.m, 0.1 * gradients[name])
        torch.testing.assert_close(moments.v, 0.001 * gradients[name] ** 2)
    with pytest.raises(UserError, match=r"SGD has no moments of .*lora_A.*: LESS needs Adam or AdamW, after a step"):
        moments_of(adapted, torch.optim.SGD(weights, lr=0.1))


def test_inner_products_over_checkpoints_are_sums_weighted_by_the_rates():
    rng = generator(0, "rows")
    pool, target = (nn.functional.normalize(torch.randn(2, n, 6, generator=rng), dim=2) for n in (4, 3))
    found = over_checkpoints([*pool], [3.0, 1.0]) @ over_checkpoints([*target], [3.0, 1.0]).T
    torch.testing.assert_close(found, 0.75 * pool[0] @ target[0].T + 0.25 * pool[1] @ target[1].T)


@pytest.mark.parametrize("width", [1, 7, 64, 300])
def test_a_projection_is_a_matrix_of_signs_whatever_the_blocks(width):
    g = torch.randn(3, 41, generator=generator(0, "g"), dtype=torch.float64)
    signs = signs_of(Projection(5, width), 41)
    assert signs.abs().eq(1).all() and not signs_of(Projection(6, width), 41).equal(signs)
    expected = g @ signs.double() / width**0.5
    for at_once in (1, 7 * width, 1 << 20):
        projection = Projection(5, width, at_once)
        torch.testing.assert_close(projection(g), expected)
        torch.testing.assert_close(projection(g[:, :17]) + projection(g[:, 17:], 17), expected)


def test_signs_are_fair_and_coordinates_independent():
    signs = signs_of(Projection(0, 512), 512)
    assert abs(signs.mean()) < 0.01
    products = signs @ signs.T / 512 - torch.eye(512)
    assert products.abs().max() < 0.3 and abs(products.mean()) < 0.001


class States(nn.Module):
    """A model whose last hidden states and mask are its batch."""

    def hidden(self, batch):
        return batch


def test_embeddings_are_position_weighted_means_of_length_1():
    hidden = torch.randn(2, 4, 3, generator=generator(0, "h"))
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    for i, length in enumerate((4, 2)):
        total = sum(range(1, length + 1))
        expected = sum((place + 1) / total * hidden[i, place].double() for place in range(length))
        found = state_rows(States(), [(hidden, mask)])[i]
        torch.testing.assert_close(found, (expected / expected.norm()).float())


# Rules


def rows(n, d=8, *, seed=0, tasks=None, dtype=torch.float32):
    values = nn.functional.normalize(torch.randn(n, d, generator=generator(seed, "rows", n)), dim=1)
    return Rows(values.to(dtype), tasks)


@pytest.mark.parametrize("tasks", [[0] * 6, [0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 2, 2]])
@pytest.mark.parametrize("budget", [1, 7, 30])
def test_rds_plus_is_what_its_words_say(tasks, budget):
    pool, target = rows(30), rows(6, tasks=torch.tensor(tasks))
    expected = reference.turns(pool.values, target.values, target.tasks, budget)
    assert coreset["rds_plus"](pool, budget, target=target).indices.tolist() == expected


def test_equal_similarities_go_to_the_lowest_index():
    pool = Rows(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    target = Rows(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    for name in ("rds_plus", "less"):
        assert coreset[name](pool, 3, target=target).indices.tolist() == [1, 2, 3]


def test_less_takes_the_mean_over_a_task_and_the_maximum_over_tasks():
    pool, target = rows(50), rows(7, tasks=torch.tensor([0, 1, 1, 0, 4, 4, 4]))
    products = pool.values @ target.values.T
    scores = torch.stack([products[:, target.tasks == task].mean(dim=1) for task in (0, 1, 4)]).amax(dim=0)
    assert coreset["less"](pool, 9, target=target).indices.equal(scores.argsort(descending=True)[:9])


def test_half_precision_is_read_as_it_is():
    pool, target = rows(200, dtype=torch.float16), rows(5, dtype=torch.float16)
    exact = pool.values.double() @ target.values.double().T
    torch.testing.assert_close(pool.similarity(target), exact.float())


@pytest.mark.parametrize(
    ("samples", "name", "target", "problem"),
    [
        (rows(9), "less", rows(0), "the target has no samples"),
        (rows(9), "rds_plus", rows(4, d=5), "the target has rows of 5 numbers, the samples of 8"),
        (HeadView(torch.ones(3, 2), torch.ones(3, 1), torch.zeros(3).long()), "less", None, "less selects by rows"),
        (rows(9), "rds_plus", HeadView(torch.ones(3, 2), torch.ones(3, 1), torch.zeros(3).long()), "a Rows, not a"),
        (rows(9), "gradmatch", None, "gradmatch selects by gradients: it needs a HeadView, not a Rows"),
        (Rows(torch.tensor([[0.0], [torch.nan]])), "less", rows(3, d=1), "sample 1: its row, or one of the target"),
    ],
)
def test_bad_rows_are_refused(samples, name, target, problem):
    with pytest.raises(UserError, match=problem):
        select(samples, 1, name, seed=0, target=target)


def test_100_000_rows_are_selected_from_in_bounded_memory(tmp_path):
    values = torch.randn(100_000, 512, generator=generator(0, "many")).half().numpy()
    np.save(tmp_path / "rows.npy", values)
    found = in_fresh_process(Path(__file__), tmp_path / "rows.npy")
    picks = found["picks"]
    assert picks["rds_plus"][:20] == list(range(0, 100_000, 5000))  # the target's samples, which take themselves first
    assert all(len(set(each)) == 500 for each in picks.values())
    # The file's pages count, 98 MiB, which the system may drop at any time. All rows in float32 would be 195 MiB more.
    assert found["grown"] < 98 + 60


def peak():
    """Largest resident memory so far in MiB, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    pool = Rows.mapped(sys.argv[1])
    few = pool[torch.arange(0, len(pool), len(pool) // 20)]
    picks = {}
    for name in ("less", "rds_plus"):
        coreset[name](pool[:2000], 10, target=few)  # what the libraries need once
    before = peak()
    for name in ("less", "rds_plus"):
        picks[name] = coreset[name](pool, 500, target=few).indices.tolist()
    print(json.dumps({"grown": peak() - before, "picks": picks}))
