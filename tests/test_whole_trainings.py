"""Phase "full" of the comparison, and the search: schedule, rule for rates, store, arithmetic."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import consistency_ops as co
from benchmarks.peers import family as family_of
from benchmarks.peers import full, full_tables, norms, search, tasks
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
    table = full_tables.small_norms(runs)
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


@pytest.mark.filterwarnings("ignore:Preconditioner. skip pattern")  # one change has names of several networks
@pytest.mark.parametrize("name", [*search.CHANGES, *search.AROUND])
@pytest.mark.parametrize("task", ["autoencoder", "fashion-convnet", "char-gpt"])
def test_every_change_of_the_search_trains(name, task):
    made = dataclasses.replace(full.FULL[task], batch=8)
    model = made.model(0)
    build, change = search.builder(name, "muon")
    step = build(model, made.loss_type, lr=0.01, **change)
    if task == "char-gpt":
        x = torch.randint(90, (8, 16))
        y = x
    else:
        x = torch.rand(8, 784) if task == "autoencoder" else torch.rand(8, 1, 28, 28)
        y = x if task == "autoencoder" else torch.randint(10, (8,))
    before = [p.detach().clone() for p in model.parameters()]
    losses = [step(x, y, made.loss) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# Tables


def fake(task: str, name: str, phase: str, lr: float, loss: float, seed: int = 1, steps: int | None = None) -> dict:
    steps = steps or full.FULL[task].steps
    curve = [[0, 0.0, None, 1.0], [steps // 10, 1.0, 3 * loss, 0.5], [steps, 10.0, loss, loss if seed == 0 else 0.25]]
    return {
        **dict(task=task, optimizer=name, phase=phase, setting={"lr": lr}, seed=seed, steps=steps, curve=curve),
        **dict(
            fixed=full.METHODS[name].fixed if name in full.METHODS else {},
            failure=None,
            train_loss=loss,
            test_loss=loss,
            seconds=steps / 100,
        ),
    }


def fakes(name: str, ends: list[float], lr: float, trials: dict[float, float]) -> list[dict]:
    runs = [fake("char-gpt", name, "trial", rate, loss, 0, 100) for rate, loss in trials.items()]
    return runs + [fake("char-gpt", name, "final", lr, end, seed) for seed, end in enumerate(ends, 1)]


def test_table_of_ends_has_mean_and_half_range_and_the_best_in_italics():
    runs = {"char-gpt": fakes("muon", [2.0, 2.2, 2.1], 0.01, {}) + fakes("muon+white", [1.0, 1.2, 1.4], 0.01, {})}
    lines = full_tables.ends(runs, "train_loss").splitlines()
    assert lines[0] == "| optimizer | char-gpt |"
    assert lines[2:] == [
        "| torch Muon, AdamW for the rest | 2.10 ± 0.100 |",
        "| **Muon, whitened, damping 0.3** | *1.20 ± 0.200* |",
    ]
    assert "*0.250 ± 0.000*" in full_tables.ends(runs, "metric")
    assert full_tables.behind_first_order(runs, "muon+white") == {"char-gpt": pytest.approx(1.2 / 2.1)}


def test_table_of_longer_trainings():
    """Of any number of steps; the best train loss is in italics, and the last tenth is that of AdamW alone."""
    runs = [fake("char-gpt", name, "final", 0.01, loss, seed, 900) for name, loss, seed in (
        ("adamw", 2.0, 1), ("adamw", 2.2, 2), ("adamw+both", 1.0, 1))]  # fmt: skip
    runs.append(fake("char-gpt", "adamw+both", "trial", 0.01, 0.5, 0, 300))
    for run in runs:
        run["curve"].insert(2, [810, 9.0, 2.0, 0.3])
    lines = full_tables.longer({"char-gpt": runs}).splitlines()
    assert lines[0].split(" | ")[1:] == [
        "torch AdamW",
        "**AdamW, whitened, outputs too, dct**",
        "torch AdamW, 90 % over the end |",
    ]
    assert lines[2:] == [
        "| char-gpt, 900 steps: train loss / test loss (nats) | 2.10 ± 0.100 / 0.250 ± 0.000 "
        "| *1.00 ± 0.000* / 0.250 ± 0.000 | 1.200 |"
    ]


def test_steps_to_muons_loss_are_between_trainings_with_their_own_decay():
    steps = full.FULL["char-gpt"].steps
    runs = [fake("char-gpt", "muon+white", "horizon", 0.01, 2.0, steps=steps // 2)]
    runs += [fake("char-gpt", "muon+white", "final", 0.01, 1.0)]
    found, seconds = full_tables.steps_to(runs, "muon+white", 1.5)
    assert found == pytest.approx(steps / 2**0.5)
    assert seconds == pytest.approx(0.75 * steps / 100)
    assert full_tables.steps_to(runs, "muon+white", 2.5)[0] == steps // 2
    assert full_tables.steps_to(runs, "muon+white", 0.9) is None
    table = full_tables.muon_steps({"char-gpt": runs + fakes("muon", [1.5], 0.01, {})})
    assert "| **Muon, whitened, damping 0.3** | 0.71 (0.75) |" in table


def test_table_of_rates_says_what_the_rate_of_the_optimizer_alone_costs():
    runs = fakes("adamw", [1.0], 0.01, {0.01: 1.0, 0.03: 2.0}) + fakes(
        "adamw+white", [1.0], 0.03, {0.01: 1.5, 0.03: 1.2}
    )
    assert full_tables.borrowed(runs, "adamw+white") == (0.01, 0.03, pytest.approx(1.25))
    assert "| **AdamW, whitened, damping 0.3** | 0.03 (at 0.01: 1.25) |" in full_tables.rates({"char-gpt": runs})


def test_tables_of_the_search():
    def run(name: str, lr: float, loss: float, seed: int = 0) -> dict:
        return fake("char-gpt", "muon", name, lr, loss, seed, search.STEPS["char-gpt"])

    runs = [run("base", 0.03, 2.0), run("whitened", 0.03, 1.5), run("whitened", 0.01, 1.2)]
    assert full_tables.search(runs).splitlines()[2:] == [
        "| base | 6.00 / 2.00 / 2.00 |",
        "| whitened | 4.50 / 1.50 / 1.50 |",  # the rate of all
    ]
    other = fake("cifar-convnet", "adamw", "dct alone", 0.03, 1.0, steps=search.STEPS["cifar-convnet"])
    assert full_tables.search([*runs, other]) == full_tables.search(runs)
    assert full_tables.kernels([*runs, other]).splitlines()[2:] == [
        f"| adamw | dct alone | 0.03 | 1.00 ± 0.000 | 0.250 ± 0.000 | {other['seconds']:.1f} |"
    ]
    ends = [("both sides", 1.0, 0), ("both sides, every=4", 1.2, 0), ("both sides, every=4", 1.4, 1)]
    steps = search.STEPS["char-gpt"]
    both = [fake("char-gpt", "adamw", name, 0.03, loss, seed, steps) for name, loss, seed in ends]
    assert full_tables.around([*runs, *both]).splitlines()[2:] == [
        "| both sides | 1.00 / 1.00 |  |  |  |",
        "| every=4 | 1.30 ± 0.100 / 0.725 ± 0.475 |  |  |  |",
    ]
    assert full_tables.search([*runs, *both]) == full_tables.search(runs)
    runs += [run("damping 0.3", 0.03, 1.4), run("norm free, damping 0.3", 0.03, 1.3)]
    runs += [run("damping 0.3", 0.01, 1.4, seed) for seed in (0, 1)]
    runs += [run("norm free, damping 0.3", 0.01, 1.3 + 0.2 * seed, seed) for seed in (0, 1)]
    assert full_tables.norms(runs).splitlines()[2:] == [
        "| char-gpt, muon | 0.01 | 2 |  | 1.40 ± 0.000 | 1.40 ± 0.100 |",
        "| char-gpt, muon | 0.03 | 1 | 2.00 | 1.40 | 1.30 |",
    ]


def test_tables_of_the_summary_and_of_the_aims():
    """Nothing is reached that was not run, and what misses its aim is in bold."""
    ends = {"adamw": 2.0, "adamw+white": 1.6, "muon": 1.5, "muon+white": 1.2, "soap": 1.0}
    runs = {"char-gpt": [run for name, end in ends.items() for run in fakes(name, [end], 0.01, {0.01: end})]}
    lines = full_tables.summary(runs, "train_loss").splitlines()
    assert lines[2] == (
        "| char-gpt, test loss (nats) | 2.00 ± 0.000 | 1.60 ± 0.000 | not run | 1.50 ± 0.000 | 1.20 ± 0.000 "
        "| *1.00 ± 0.000, heavyball SOAP* |"
    )
    found = [line.split(" | ")[2:] for line in full_tables.goals(runs).splitlines()[2:]]
    assert [cells[1].removesuffix(" |") for cells in found] == [
        "**char-gpt 1.07**",  # over the best of first order
        "char-gpt 0.80",
        "char-gpt 0.80",  # AdamW, whitened and alone
        "char-gpt 0.80",
        "char-gpt 1.00",  # the same rate
        "char-gpt 1.00",
        "**char-gpt 1.07**",  # AdamW, whitened, over Muon
        "**char-gpt 1.00**",  # steps: no shorter training was run
        "**char-gpt 1.00**",  # not below SOAP's CPU seconds
        "**char-gpt 1.20**",
        "**char-gpt ≥ 1.00**",  # nor its steps to Muon's loss, of which only a bound is known
        "**char-gpt ≥ 1.00**",
    ]
    assert [cells[0] for cells in found] == ["0 of 1 run"] + ["1 of 1 run"] * 5 + ["0 of 1 run"] * 6
    steps = full.FULL["char-gpt"].steps
    runs["char-gpt"] += [fake("char-gpt", "soap", "horizon", 0.01, 2.0, steps=steps // 2)]
    runs["char-gpt"] += [fake("char-gpt", "muon+white", "horizon", 0.01, 1.5, steps=steps // 2)]
    found = [line.split(" | ")[3].removesuffix(" |") for line in full_tables.goals(runs).splitlines()[-2:]]
    assert found == ["char-gpt 0.71", "char-gpt 0.67"]  # a half, over 2 ** -0.5; seconds over 0.75 of the whole
    runs["char-gpt"] = [run for run in runs["char-gpt"] if run["phase"] != "horizon"]
    runs["char-gpt"] += fakes("adamw+both", [1.35], 0.01, {0.01: 1.0})
    found = [line.split(" | ")[2:] for line in full_tables.goals(runs).splitlines() if "outputs too" in line]
    assert found[0] == ["1 of 1 run", "char-gpt 0.90 |"]  # beside those of the inputs alone
    assert [cells[0] for cells in found] == ["1 of 1 run"] * 4 + ["0 of 1 run"] * 5
    soap = [run for run in runs["char-gpt"] if run["optimizer"] == "soap"]
    soap[-1]["train_loss"] = 1.7
    last = full_tables.goals(runs).splitlines()[-1]
    assert last.endswith("| 1 of 1 run | char-gpt SOAP does not get there |")
    runs["char-gpt"] = [run for run in runs["char-gpt"] if run not in soap and run["optimizer"] != "adamw+both"]
    found = [line.split(" | ")[2:] for line in full_tables.goals(runs).splitlines()[2:]]
    assert [cells[0] for cells in found[-4:]] == ["0 of 0 run"] * 4


def test_table_of_steps_to_the_best_of_first_order():
    steps = full.FULL["char-gpt"].steps
    runs = fakes("adamw", [1.5], 0.01, {}) + fakes("muon", [2.0], 0.01, {}) + fakes("muon+white", [1.0], 0.01, {})
    lines = full_tables.first_order_steps({"char-gpt": runs}).splitlines()
    assert lines[0] == "| optimizer | char-gpt, 1.50, adamw |"
    assert lines[2:] == [
        f"| torch AdamW | {steps} ({steps / 100:.1f} s) |",
        "| torch Muon, AdamW for the rest | not reached |",
        f"| **Muon, whitened, damping 0.3** | ≤ {steps} ({steps / 100:.1f} s) |",
    ]
    runs += [fake("char-gpt", "muon+white", "horizon", 0.01, 2.0, steps=steps // 2)]
    found = full_tables.first_order_steps({"char-gpt": runs}).splitlines()[-1]
    assert found == f"| **Muon, whitened, damping 0.3** | {steps / 2**0.5:.0f} ({0.75 * steps / 100:.1f} s) |"


def test_table_of_the_last_tenth_says_how_far_an_optimizer_still_fell():
    def run(late: float, end: float) -> dict:
        made = fake("char-gpt", "adamw", "final", 0.01, 1.0)
        steps = made["steps"]
        return made | {"curve": [[0, 0.0, None, 9.0], [round(0.9 * steps), 1.0, 1.0, late], [steps, 2.0, 1.0, end]]}

    assert full_tables.converged({"char-gpt": [run(1.2, 1.0), run(2.3, 2.0)]}).splitlines()[2:] == [
        "| torch SGD, momentum 0.9 | not run |",
        "| torch AdamW | 1.167 |",
        "| torch AdamW, betas 0.9, 0.95 | not run |",
        "| torch Muon, AdamW for the rest | not run |",
    ]
