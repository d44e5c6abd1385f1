"""One line in the training scripts of others: Hugging Face Trainer, Accelerate, Lightning, a plain loop with timm."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import consistency_ops as co
from support import documents, frameworks, ranks, trainers

ROOT = Path(__file__).resolve().parents[1]


def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps=4, backward=torch.Tensor.backward):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(functional.cross_entropy(model(x), y))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class Wrapper(torch.optim.Optimizer):
    """An optimizer as Accelerate wraps it: it has the type, but torch.optim.Optimizer.__init__ did not run."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        if name.startswith("_optimizer_step"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_a_wrapped_optimizer_is_the_wrapped_one():
    model, optimizer = small()
    co.Preconditioner(model, optimizer)
    expected = train(model, optimizer)
    model, optimizer = small()
    wrapped = Wrapper(Wrapper(optimizer))
    pre = co.Preconditioner(model, wrapped)
    assert all(map(torch.equal, train(model, wrapped), expected))
    assert pre.steps == 4
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    pre.remove()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.fixture(params=["kernels", "torch"])
def computed_by(request, monkeypatch):
    """The kernels, or torch's own operations: in this process, and in the ranks that it starts."""
    if request.param == "torch":
        monkeypatch.setenv("CONSISTENCY_OPS_BACKEND", "torch")
        co.set_backend("torch")
    yield request.param
    co.set_backend("auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", trainers.MODELS)
def test_one_line_lowers_the_loss(name, tmp_path, computed_by):
    """50 steps by their own trainers, the same seed with and without the line; bench_trainers.py has three seeds."""
    plain, corrected = (trainers.MODELS[name](str(tmp_path), 0, on) for on in (False, True))
    assert corrected < plain


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(decay=0.5, every=3)], ids=str)
@pytest.mark.parametrize("make", [trainers.gpt2_trainer, trainers.vit_trainer])
def test_huggingface_resumes_bit_for_bit(make, options, tmp_path, computed_by):
    """A run from the Trainer's own checkpoint ends where the uninterrupted one does.

    The model is made with ``from_pretrained``, as a script that resumes may well do. Trainer reads the weights again,
    but transformers renames those of some models (ViT) in checkpoints, and Trainer leaves what it does not find as it
    is, with a warning (huggingface/transformers#43701, with or without us).
    """
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = make(str(tmp_path), 0, steps=8, save_strategy="steps", save_steps=4, weights=resume)
        pre = co.Preconditioner(trainer.model, trainer.create_optimizer(), **options)
        trainer.train(resume_from_checkpoint=resume)
        assert pre.steps == 8
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["preconditioner", "prepare"])
def test_accelerate(first, computed_by):
    """The line may stand before or after `prepare`."""
    (accelerate,) = frameworks.require("accelerate")
    model, optimizer = small()
    co.Preconditioner(model, optimizer)
    expected = train(model, optimizer)

    model, optimizer = small()
    accelerator = accelerate.Accelerator(cpu=True)
    if first == "preconditioner":
        pre = co.Preconditioner(model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if first == "prepare":
        pre = co.Preconditioner(model, optimizer)
    assert all(map(torch.equal, train(model, optimizer, backward=accelerator.backward), expected))
    assert pre.steps == 4


@pytest.mark.slow
def test_trainers_that_wrap_the_model_for_two_ranks(tmp_path, computed_by):
    """Covariances are pooled, so parameters are the same bits though each rank saw other data.

    Accelerate, Lightning and Trainer, which use DistributedDataParallel, and GPT-2 in fully_shard.
    """
    frameworks.require("accelerate", "lightning", "transformers")
    rows = {"accelerated": (8, 2), "lightened": (32, 2), "transformed": (32 * 32, 8), "sharded": (4 * 32, 8)}
    results = ranks.run("trainers_ranks", list(rows), 2, tmp_path)
    for name in rows:
        for found in results[name]:
            assert not isinstance(found, str), found
            assert found["same"] and found["steps"] == 6 and found["messages"] == []
            assert (set(found["rows"].values()), found["layers"]) == ({rows[name][0]}, rows[name][1])
            assert found.get("difference", 0.0) < 1e-4  # between fully_shard and DistributedDataParallel, in float32


EXAMPLES = [
    (name, block) for name in documents.manual() for block in documents.examples(name) if frameworks.used_by(block)
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_examples_of_the_readme(page, example, tmp_path, monkeypatch):
    """The examples of the manual that use a framework. Each runs alone, as somebody who copies it would run it."""
    frameworks.require(*frameworks.used_by(example))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, page, "exec"), {})


def test_every_framework_has_an_example():
    assert {name for _, block in EXAMPLES for name in frameworks.used_by(block)} == set(frameworks.NAMES)
