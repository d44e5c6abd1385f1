"""``mode="whiten"``: what is saved, loaded and left behind by a step that did not end."""

import copy

import pytest
import torch

import consistency_ops as co
from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp
from support.whitening import adamw, resumes_bitwise, same, steps_of


@pytest.mark.parametrize("options", [{}, dict(every=3), dict(decay=0.0), dict(decay=0.0, every=2)], ids=str)
@pytest.mark.parametrize("at", [2, 25])
def test_resume_is_bitwise(options, at):
    resumes_bitwise(at, **options)


def test_a_state_of_the_other_mode_is_dropped_with_a_word(caplog):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    Preconditioner(model, optimizer, mode="correct", decay=0.9, every=2, chunk=8)
    backward(model, *data())
    optimizer.step()
    other = mlp()
    twin = torch.optim.AdamW(other.parameters())
    pre = Preconditioner(other, twin, mode="whiten", every=2, chunk=8)
    twin.load_state_dict(optimizer.state_dict())
    assert "saved with another" in caplog.text and pre.state_dict()["layers"] == {}


def test_a_checkpoint_of_torch_distributed_resumes(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = mlp()
    optimizer = adamw(model)
    steps_of(model, optimizer, 3, every=2)
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    again = mlp(seed=5)
    other = adamw(again)
    pre = Preconditioner(again, other, mode="whiten", chunk=8, every=2)
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    for step in range(3, 6):
        for m, o in ((model, optimizer), (again, other)):
            o.zero_grad()
            backward(m, *data(seed=step))
            o.step()
    same(model, again)
    assert pre.steps == 6


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_step_that_is_broken_off_does_not_count_in_the_average(backend):
    """It is tried again with the same batch, whose rows count once, and the weights stay until then."""
    co.set_backend(backend)
    try:
        model, plain = mlp(), mlp()
        optimizer, twin = adamw(model), adamw(plain)
        pre, pre_twin = (Preconditioner(m, o, mode="whiten", chunk=8) for m, o in ((model, optimizer), (plain, twin)))

        def step_of(model, optimizer, seed):
            optimizer.zero_grad()
            backward(model, *data(seed=seed))
            optimizer.step()

        def refuse(*_):
            raise RuntimeError("broken off")

        for seed in range(3):
            if seed == 1:
                before = [p.detach().clone() for p in model.parameters()]
                handle = optimizer.register_step_pre_hook(refuse)  # called after ours
                with pytest.raises(RuntimeError, match="broken off"):
                    step_of(model, optimizer, seed)
                handle.remove()
                assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            step_of(model, optimizer, seed)
            step_of(plain, twin, seed)
    finally:
        co.set_backend("auto")
    same(model, plain)
    stored, want = (one.state_dict()["layers"] for one in (pre, pre_twin))
    for name in want:
        assert torch.equal(stored[name]["covariance"], want[name]["covariance"])
        assert float(stored[name]["weight"]) == pytest.approx(1 - 0.95**3)
