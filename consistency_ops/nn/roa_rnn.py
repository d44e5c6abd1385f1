"""The recurrent form of random orthogonal additive networks, with the inputs that ``nn.RNN`` takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from ..ops.checks import check_integers, check_sizes, type_name
from .activations import SLOPES, make_activation
from .orthogonal import OrthogonalFilter
from .roa import JacobianBounds, check_segment, check_weights, roa_jacobian_bounds, spectral_norm
from .roa_steps import steps_at_once, tell


class ROARNN(nn.Module):
    """A recurrent network with a random orthogonal additive update, called as ``nn.RNN`` is.

    For t = 1, ..., T ::

        h_t = alpha O h_{t-1} + beta phi(W_h h_{t-1} + W_x u_t + b)

    Args:
        input_size, hidden_size: sizes, at least 1.
        beta: weight of the new activation, > 0.  Gradients over T steps stay within bounds that do not depend on T
            when beta is about 1 / T.
        alpha: weight of the filtered past, >= 0.  Default: 1 - beta.
        activation, filter, generator: as for :class:`ROAFeedForward`.
        batch_first: inputs and outputs are (N, T, ...) instead of (T, N, ...).
        checkpoint: keep for backward only the state after every so many steps, and compute the others again, segment
            by segment, for one more forward pass; the states that are returned are the caller's to keep or to drop.
            0: keep all. A packed sequence is always kept.

    The states have about the size of beta. A read-out therefore learns far sooner from ``10 * states``, or with
    gradients corrected by :class:`consistency_ops.Preconditioner`; both together are best
    (``benchmarks/training/roa_memory.py``). On permuted MNIST ``mode="whiten"`` is better still, with beta well above
    1 / T and alpha = 1 (``benchmarks/training/roa_pixels.py``). Over thousands of steps give the read-out states of
    unit size, normalised over the batch or divided by beta ("scaled" in ``benchmarks/training/roa_memory.py``).

    On a CPU all steps are computed in one call where nothing can tell: plain submodules without hooks other than those
    of a :class:`consistency_ops.Preconditioner`, one dtype, no transform of ``torch.func``. The states are then kept in
    float32 between the steps also where they are returned in half precision.

    It is called with ``u`` and, optionally, ``h_0``.  ``u``: (T, N, input_size); (T, input_size) without a batch; or a
    :class:`torch.nn.utils.rnn.PackedSequence`.  ``h_0``, by default zeros: (N, hidden_size), or (hidden_size) without a
    batch; in the order of the batch before it was sorted for packing.

    Returns:
        All states, (T, N, hidden_size), (T, hidden_size) or packed as ``u`` is, and the last one of every sequence, of
        the shape of ``h_0``.

    Raises:
        TypeError: an input of another type.
        ValueError: an unknown name, a number out of range, or inputs of another shape.

    Source: Ceni 2022, arXiv 2210.01245 (roaRNN).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        beta: float = 0.01,
        alpha: float | None = None,
        activation: str = "tanh",
        filter: str = "permutation",
        batch_first: bool = False,
        checkpoint: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("ROARNN", input_size=input_size, hidden_size=hidden_size)
        self.alpha: float
        self.beta: float
        self.alpha, self.beta = check_weights("ROARNN", alpha, beta)
        self.activation: str = activation
        self.checkpoint: int = check_segment("ROARNN", checkpoint)
        self.phi: nn.Module = make_activation("ROARNN", activation)
        self.input_size: int = input_size
        self.hidden_size: int = hidden_size
        self.batch_first: bool = batch_first
        options: dict[str, Any] = dict(device=device, dtype=dtype)
        self.input: nn.Linear = nn.Linear(input_size, hidden_size, **options)
        self.recurrent: nn.Linear = nn.Linear(hidden_size, hidden_size, bias=False, **options)
        self.filter: OrthogonalFilter = OrthogonalFilter(hidden_size, filter, generator=generator, **options)

    def forward(self, u: Tensor | PackedSequence, h_0: Tensor | None = None) -> tuple[Any, Tensor]:
        # `Any`: Tensor or PackedSequence, as u is.
        if not isinstance(u, (Tensor, PackedSequence)):
            raise TypeError(f"ROARNN: u must be a Tensor, got {type_name(u)}")
        if h_0 is not None and not isinstance(h_0, Tensor):
            raise TypeError(f"ROARNN: h_0 must be a Tensor, got {type_name(h_0)}")
        if isinstance(u, PackedSequence):
            return self._packed(u, h_0)
        if u.dim() not in (2, 3) or u.shape[-1] != self.input_size:
            order = "(N, T, input_size)" if self.batch_first else "(T, N, input_size)"
            raise ValueError(
                f"ROARNN: u must be {order}, or (T, input_size) without a batch, with input_size {self.input_size}, "
                f"got {tuple(u.shape)}"
            )
        single = u.dim() == 2
        if single:
            u = u.unsqueeze(1)
        elif self.batch_first:
            u = u.transpose(0, 1)
        expected = (self.hidden_size,) if single else (u.shape[1], self.hidden_size)
        _check_state(h_0, expected)
        h = None if h_0 is None else h_0.unsqueeze(0) if single else h_0
        if self.checkpoint and torch.is_grad_enabled():
            outputs, h = self._segments(u, h)
        else:
            outputs, h = self._steps(u, h)
        if single:
            return outputs.squeeze(1), h.squeeze(0)
        return (outputs.transpose(0, 1) if self.batch_first else outputs), h

    def _steps(self, u: Tensor, h_0: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._drive(self.input(u), h_0, None)

    def _segments(self, u: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = []
        for piece in torch.split(u, self.checkpoint):
            part, h = run_again_in_backward(self._steps, piece, h, use_reentrant=False, preserve_rng_state=False)
            parts.append(part)
        assert h is not None  # split gives at least one piece, also of no steps
        return torch.cat(parts), h

    def _packed(self, u: PackedSequence, h_0: Tensor | None) -> tuple[PackedSequence, Tensor]:
        if u.data.dim() != 2 or u.data.shape[-1] != self.input_size:
            raise ValueError(
                f"ROARNN: u must be packed from sequences (T, input_size) with input_size {self.input_size}, got data "
                f"of shape {tuple(u.data.shape)}"
            )
        rows = int(u.batch_sizes[0])
        _check_state(h_0, (rows, self.hidden_size))
        if h_0 is not None and u.sorted_indices is not None:
            h_0 = h_0.index_select(0, u.sorted_indices)
        # Padding follows the last step of a sequence, so nothing depends on it.
        drive, lengths = pad_packed_sequence(PackedSequence(self.input(u.data), u.batch_sizes))
        states, _ = self._drive(drive, h_0, lengths)
        last = states[lengths.to(states.device) - 1, torch.arange(rows, device=states.device)]
        if u.unsorted_indices is not None:
            last = last.index_select(0, u.unsorted_indices)
        return u._replace(data=pack_padded_sequence(states, lengths).data), last

    def _drive(self, drive: Tensor, h_0: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """All states and the last one, of rows that are as long as ``lengths`` says, the longest first."""
        h = drive.new_zeros(drive.shape[1:]) if h_0 is None else h_0
        options: dict[str, Any] = dict(alpha=self.alpha, beta=self.beta, activation=self.activation)
        together = steps_at_once(drive, h, self.recurrent, self.filter, self.phi, **options)
        if together is not None:
            if self.recurrent._forward_pre_hooks and len(drive):
                before = torch.cat([h.unsqueeze(0), together[0][:-1]])
                tell(self.recurrent, before if lengths is None else pack_padded_sequence(before, lengths).data)
            return together
        states = []
        for t, step in enumerate(drive.unbind(0)):
            rows = len(h) if lengths is None else int((lengths > t).sum())
            now = h[:rows]
            new = torch.add(self.alpha * self.filter(now), self.phi(step[:rows] + self.recurrent(now)), alpha=self.beta)
            h = new if rows == len(h) else torch.cat([new, h[rows:]])
            states.append(h)
        return (torch.stack(states) if states else drive), h

    def jacobian_bounds(self, steps: int) -> JacobianBounds:
        """Bound the singular values of dh_T / dh_0, T = ``steps``, for all inputs, from the present weights."""
        check_integers("ROARNN.jacobian_bounds", steps=steps)
        if steps < 0:
            raise ValueError(f"ROARNN.jacobian_bounds: steps must be at least 0, got {steps}")
        norm = spectral_norm(self.recurrent.weight)
        one = roa_jacobian_bounds(self.alpha, self.beta, [norm], slope=SLOPES[self.activation])
        return JacobianBounds(*(steps * value if steps else 0.0 for value in one))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, batch_first={self.batch_first}"


def _check_state(h_0: Tensor | None, expected: tuple[int, ...]) -> None:
    if h_0 is not None and h_0.shape != expected:
        raise ValueError(f"ROARNN: h_0 must be {expected}, got {tuple(h_0.shape)}")
