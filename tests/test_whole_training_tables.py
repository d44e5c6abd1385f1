"""The tables of the whole trainings and of the search, made of small invented runs."""

import pytest

from benchmarks.peers import full, full_tables, search, search_tables


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
    assert search_tables.search(runs).splitlines()[2:] == [
        "| base | 6.00 / 2.00 / 2.00 |",
        "| whitened | 4.50 / 1.50 / 1.50 |",  # the rate of all
    ]
    other = fake("cifar-convnet", "adamw", "dct alone", 0.03, 1.0, steps=search.STEPS["cifar-convnet"])
    assert search_tables.search([*runs, other]) == search_tables.search(runs)
    assert search_tables.kernels([*runs, other]).splitlines()[2:] == [
        f"| adamw | dct alone | 0.03 | 1.00 ± 0.000 | 0.250 ± 0.000 | {other['seconds']:.1f} |"
    ]
    ends = [("both sides", 1.0, 0), ("both sides, every=4", 1.2, 0), ("both sides, every=4", 1.4, 1)]
    steps = search.STEPS["char-gpt"]
    both = [fake("char-gpt", "adamw", name, 0.03, loss, seed, steps) for name, loss, seed in ends]
    assert search_tables.around([*runs, *both]).splitlines()[2:] == [
        "| both sides | 1.00 / 1.00 |  |  |  |",
        "| every=4 | 1.30 ± 0.100 / 0.725 ± 0.475 |  |  |  |",
    ]
    assert search_tables.search([*runs, *both]) == search_tables.search(runs)
    runs += [run("damping 0.3", 0.03, 1.4), run("norm free, damping 0.3", 0.03, 1.3)]
    runs += [run("damping 0.3", 0.01, 1.4, seed) for seed in (0, 1)]
    runs += [run("norm free, damping 0.3", 0.01, 1.3 + 0.2 * seed, seed) for seed in (0, 1)]
    assert search_tables.norms(runs).splitlines()[2:] == [
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
