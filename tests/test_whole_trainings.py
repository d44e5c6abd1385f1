"""Phase "full" of the comparison, and the search: schedule, rule for rates, store, arithmetic."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import consistency_ops as co
from benchmarks.peers import family as family_of
from benchmarks.peers import full, norms, search, search_tables, tasks
from benchmarks.peers.family import Family
from benchmarks.peers.optimizers import MatrixMuon
from benchmarks.peers.tasks import Split


def tried(best: int, failing=()) -> list[int]:
    """The five places of the rule when the loss grows with the distance from ``best``."""
    values: dict[int, float] = {}
    while len(values) < full.TRIALS:
        place = full.next_rate(values)
        assert place not in values
        values[place] = math.inf if place in failing else abs(place - best)
    return list(values)


def test_rates_are_halved_decades_first_and_quarters_where_the_best_is_enclosed():
    assert tried(0) == [0, 2, -2, 1, -1] or tried(0) == [0, 2, -2, -1, 1]
    assert tried(1) == [0, 2, -2, 1, -1] or tried(1) == [0, 2, -2, 4, 1]
    assert tried(2) == [0, 2, -2, 4, 1] or tried(2) == [0, 2, -2, 4, 3]
    assert tried(9) == [0, 2, -2, 4, 6]
    assert tried(-9) == [0, 2, -2, -4, -6]
    assert tried(9, failing=(2, 4, 6)) == [0, 2, -2, -1, 1]  # the side of the better neighbour first
    assert tried(0, failing=(0, 2, -2, -4, -6)) == [0, 2, -2, -4, -6]
    assert [full.rate(0.01, place) for place in (-4, -2, -1, 0, 1, 2)] == [0.001, 0.0032, 0.0056, 0.01, 0.018, 0.032]


def test_the_schedule_rises_for_a_twentieth_and_falls_to_nearly_zero():
    values = [full.factor(i, 100) for i in range(1, 101)]
    assert values[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[5] == 1.0
    assert values[-1] == pytest.approx(1 / 95)
    assert values[5:] == sorted(values[5:], reverse=True)


def random_split(count: int = 600) -> Split:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 784, generator=generator)
    return Split(*[(x, x)] * 3)


@pytest.fixture
def task(monkeypatch):
    made = dataclasses.replace(full.FULL["autoencoder"], batch=50, steps=12, load=lambda _: random_split(), points=4)
    monkeypatch.setitem(full.FULL, "autoencoder", made)
    return made


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", *full.OURS])
def test_methods_follow_the_schedule(task, name):
    """The last step has a rate of nearly 0, and the first one a part of the whole."""
    model = task.model(0)
    step = full.METHODS[name].build(model, "mse", lr=0.01, **full.METHODS[name].fixed)
    schedule = full.Schedule(step)
    x = random_split().train[0][:50]
    schedule.set(0.0)
    before = [p.detach().clone() for p in model.parameters()]
    step(x, x, task.loss)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    schedule.set(0.5)
    assert {group["lr"] for one in full.optimizers_in(step.keep) for group in one.param_groups} == {0.005}
    step(x, x, task.loss)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True) if p.dim() > 1)


def test_a_stopped_phase_goes_on_where_it_was(task, tmp_path, capsys, monkeypatch):
    arguments = [
        "autoencoder",
        "--optimizers",
        "adamw",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
        "--horizons",
        "0.5",
        "0.75",
    ]
    full.main([*arguments, "--minutes", "0"])
    assert "--resume goes on" in capsys.readouterr().out
    full.main(arguments)
    store = full.Store(tmp_path / "autoencoder.jsonl")
    assert [run["phase"] for run in store.runs] == ["trial"] * 5 + ["final"] + ["horizon"] * 2
    assert [run["steps"] for run in store.runs] == [4] * 5 + [12, 6, 9]
    best = min(store.runs[:5], key=full.last)
    final = store.runs[5]
    assert final["setting"] == best["setting"]
    assert [point[0] for point in final["curve"]] == [0, 3, 6, 9, 12]
    assert final["curve"][-1][3] == pytest.approx(final["test_loss"], rel=1e-4)
    with pytest.raises(SystemExit):
        full.main(arguments)  # there are runs
    text = (tmp_path / "autoencoder.jsonl").read_text()
    (tmp_path / "autoencoder.jsonl").write_text("".join(f"{line}\n" for line in text.splitlines()[:-2]))
    capsys.readouterr()
    full.main([*arguments, "--resume"])
    assert capsys.readouterr().out.count("horizon") == 2
    again = full.Store(tmp_path / "autoencoder.jsonl").runs
    assert [[p[3] for p in run["curve"]] for run in again] == [[p[3] for p in run["curve"]] for run in store.runs]
    full.main(["autoencoder", "--optimizers", "adamw", "--seeds", "1", "--out", str(tmp_path), "--status"])
    assert "adamw 5/5+1/1" in capsys.readouterr().out


def test_the_small_runs_of_the_norms_are_stored_once(monkeypatch, tmp_path, capsys):
    """They differ by the norm alone, end at another loss with each setting, and are not made again."""
    monkeypatch.setitem(norms.SMALL, "autoencoder", (*norms.SMALL["autoencoder"][:3], 20, 6))
    monkeypatch.setitem(
        norms.TASKS, "autoencoder", dataclasses.replace(full.TASKS["autoencoder"], load=lambda _: random_split())
    )
    arguments = ["norms", "autoencoder", "--bases", "adamw", "--seeds", "1", "--out", str(tmp_path / "norms.jsonl")]
    monkeypatch.setattr("sys.argv", arguments)
    norms.main()
    assert capsys.readouterr().out.count("autoencoder adamw") == 3
    runs = full.Store(tmp_path / "norms.jsonl").runs
    assert len({run["train_loss"] for run in runs}) == 3 and not any(run["failure"] for run in runs)
    norms.main()
    assert capsys.readouterr().out == ""
    assert full.Store(tmp_path / "norms.jsonl").runs == runs
    table = search_tables.small_norms(runs)
    assert table.count("\n") == 1 + 2 * len(norms.SMALL)


def test_muon_steps_convolutions_as_matrices():
    torch.manual_seed(0)
    conv, matrix = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(4, 12))
    with torch.no_grad():
        matrix.copy_(conv.flatten(1))
    ours = MatrixMuon([conv], lr=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        matrix.grad = torch.randn(4, 12)
        conv.grad = matrix.grad.view_as(conv).clone()
        ours.step()
        theirs.step()
    assert torch.equal(conv.detach().flatten(1), matrix.detach())


@pytest.mark.parametrize("name", [name for name in full.FULL if "gpt" in name])
def test_losses_of_texts_take_the_rows_of_kfac(name):
    """K-FAC's package has the positions of a text flat, (rows, symbols)."""
    output, y = torch.randn(2, 3, 256 if name == "byte-gpt" else tasks.CHARACTERS), torch.randint(0, 90, (2, 3))
    assert torch.equal(full.FULL[name].loss(output, y), full.FULL[name].loss(output.flatten(0, 1), y))


# The family


def trained(make, steps: int = 4, conv: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3) if conv else nn.Linear(6, 5)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(5 * 4 if conv else 5, 4))
    step = make(model)
    for _ in range(steps):
        x = torch.randn(40, 6, 4, 4) if conv else torch.randn(40, 6) * torch.linspace(0.2, 2, 6)
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("keep_norm", [True, False])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_the_family_has_the_product_in_it(base, keep_norm):
    def product(model):
        optimizer = base(model.parameters(), lr=0.01)
        pre = co.Preconditioner(model, optimizer, mode="whiten", keep_norm=keep_norm)
        return lambda: (optimizer.step(), pre)

    def ours(model):
        norm = "keep" if keep_norm and base is not torch.optim.SGD else "free"  # SGD's is never scaled
        return Family(model, [base(model.parameters(), lr=0.01)], norm=norm).step

    for a, b in zip(trained(product), trained(ours), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["", "dct"])
def test_the_family_has_both_sides_of_the_product_in_it(kernels):
    """And cosines of kernels."""

    def product(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        pre = co.Preconditioner(model, optimizer, mode="whiten", outputs=True, dct=bool(kernels))
        return lambda: (optimizer.step(), pre)

    def ours(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        both = dict(output=0.5, output_root="cholesky", output_of="gradients", kernels=kernels)
        return Family(model, [optimizer], **both).step

    for a, b in zip(*(trained(make, conv=bool(kernels)) for make in (product, ours)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("root", ["cholesky", "symmetric"])
def test_both_halves_around_sgd_are_the_whole_inverse(root, conv):
    """With a norm that is free, inner and outer half make G M^-1, whatever the root; so does one half of power 1."""

    def family(**options):
        return lambda model: (
            Family(model, [torch.optim.SGD(model.parameters(), lr=0.01)], norm="free", chunk=4, **options).step
        )

    whole = trained(family(root="symmetric", inner=0.0, outer=1.0), conv=conv)
    for a, b in zip(trained(family(root=root), conv=conv), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_mean_apart_is_in_the_moment_across_chunks():
    """SGD's step is G M^-1 with the covariance by chunks and the outer product of the mean whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    family = Family(model, [torch.optim.SGD(model.parameters(), lr=1.0)], norm="free", chunk=4, mean_apart=True)
    before = torch.cat([model[0].weight.detach(), model[0].bias.detach()[:, None]], 1)
    x = torch.randn(40, 6) + 2
    model(x).square().sum(1).mean().backward()
    gradient = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    family.step()
    x = nn.functional.pad(x, (0, 1), value=1.0)
    order = family.layers[0].division.order
    chunk_of = torch.empty(7, dtype=torch.long).scatter_(0, order, torch.arange(7) // 4)
    together = chunk_of[:, None] == chunk_of
    mean = x.mean(0)
    whole = x.T @ x / 40
    tau = whole.trace() / 7
    moment = ((whole - torch.outer(mean, mean)) * together + torch.outer(mean, mean)) / tau + 0.1 * torch.eye(7)
    after = torch.cat([model[0].weight.detach(), model[0].bias.detach()[:, None]], 1)
    torch.testing.assert_close(before - after, gradient @ torch.linalg.inv(moment), rtol=1e-3, atol=1e-5)


def test_momentum_before_whitening_is_an_average_of_the_gradients():
    """Without factors: corrected for its start at 0."""
    model = nn.Sequential(nn.Linear(6, 5))
    options = dict(inner=0.0, outer=0.0, root="symmetric", norm="free", momentum=0.9)
    family = Family(model, [torch.optim.SGD(model.parameters(), lr=1.0)], **options)
    given = []
    for _ in range(3):
        x = torch.randn(40, 6)
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        given.append(model[0].weight.grad.clone())
        before = model[0].weight.detach().clone()
        family.step()
        shares = [0.9 ** (len(given) - 1 - i) for i in range(len(given))]
        mean = sum(share * one for share, one in zip(shares, given, strict=True)) / sum(shares)
        torch.testing.assert_close(before - model[0].weight.detach(), mean, rtol=1e-4, atol=1e-5)


def test_dampings_of_layers_go_from_the_first_to_the_last():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    family = Family(model, [torch.optim.SGD(model.parameters(), lr=0.01)], damping=1.0, last_damping=0.01)
    assert [layer.damping for layer in family.layers] == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize("kernels", ["dct", "eigen"])
def test_another_basis_of_the_taps_is_nothing_to_sgd(kernels):
    def family(**options):
        return lambda model: Family(model, [torch.optim.SGD(model.parameters(), lr=0.01)], **options).step

    for a, b in zip(trained(family(), conv=True), trained(family(kernels=kernels), conv=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    whitened = trained(family(kernels="cholesky"), conv=True)
    assert float((whitened[0] - trained(family(), conv=True)[0]).abs().max()) > 1e-4


def test_the_basis_of_eigenvectors_follows_its_matrix():
    """At first it is exact; afterwards one step of the iteration keeps order and signs, and many find a new one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 5, generator=generator) * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    first = family_of.moments(x)
    basis = family_of.followed(first, None)
    there, back = family_of.in_basis(first, basis, 0.5, 0.5)
    torch.testing.assert_close(there @ back @ first, torch.eye(5).expand(3, 5, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(family_of.followed(first, basis), basis, rtol=0, atol=1e-4)
    second = family_of.moments(x + 0.3 * torch.randn(3, 200, 5, generator=generator))
    followed = family_of.followed(second, basis)
    assert bool(((followed * basis).sum(1) > 0.9).all())  # no column has turned round
    for _ in range(40):
        followed = family_of.followed(second, followed)
    there, back = family_of.in_basis(second, followed, 0.25, 0.75)
    torch.testing.assert_close(there @ back @ second, torch.eye(5).expand(3, 5, 5), rtol=0, atol=1e-3)


def test_betas_reach_adam_with_and_without_the_family():
    model = full.FULL["char-gpt"].model(0)
    for alone in (False, True):
        step = search.build_family("adamw")(model, "cross_entropy", lr=0.01, betas=(0.8, 0.9), alone=alone)
        assert [group["betas"] for part in full.optimizers_in(step.keep) for group in part.param_groups] == [(0.8, 0.9)]


def test_the_norm_of_a_layer_is_that_of_the_optimizer():
    moves = {}
    for norm in ("keep", "clip", "free"):
        start = trained(lambda model: lambda: None, 1)
        sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.01)  # noqa: E731
        family = dict(norm=norm, inner=0.0, root="symmetric")
        end = trained(lambda model, sgd=sgd, family=family: Family(model, [sgd(model)], **family).step, 1)
        moves[norm] = torch.cat([(a - b).flatten() for a, b in zip(end[:2], start[:2], strict=True)]).norm()
    plain = trained(lambda model: torch.optim.SGD(model.parameters(), lr=0.01).step, 1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain[:2], start[:2], strict=True)]).norm()
    torch.testing.assert_close(moves["keep"], moved, rtol=1e-3, atol=0)
    torch.testing.assert_close(moves["clip"], min(moved, moves["free"]), rtol=1e-3, atol=0)
    assert abs(moves["free"] / moved - 1) > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Preconditioner. skip pattern")  # one change has names of several networks
@pytest.mark.parametrize("name", [*search.CHANGES, *search.AROUND])
@pytest.mark.parametrize("task", ["autoencoder", "fashion-convnet", "char-gpt"])
def test_every_change_of_the_search_trains(name, task):
    made = dataclasses.replace(full.FULL[task], batch=8)
    if task == "char-gpt":
        x = y = torch.randint(90, (8, 16))
    elif task == "autoencoder":  # its layers, narrower
        made = dataclasses.replace(made, model=tasks.mlp([64, 32, 16, 8, 16, 32, 64], nn.Tanh, 1.0))
        x = y = torch.rand(8, 64)
    else:
        x, y = torch.rand(8, 1, 28, 28), torch.randint(10, (8,))
    model = made.model(0)
    build, change = search.builder(name, "muon")
    step = build(model, made.loss_type, lr=0.01, **change)
    before = [p.detach().clone() for p in model.parameters()]
    losses = [step(x, y, made.loss) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
