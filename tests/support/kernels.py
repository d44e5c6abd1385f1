"""Other kernels behind the operators, on CPU tensors, so that the ordinary tests also test them.

``simt``: the CUDA kernels and their bindings, compiled for the host (tests/simt); small shapes only, because a CUDA
thread is a fiber.  ``torch``: the portable operators, out of torch's own operations.  ``second``: the same on a
device that is not the CPU (second_device.py), where no operation may look at values.  ``cuda``: a CUDA device;
arguments and results are copied there and back, with their strides.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import consistency_ops  # noqa: F401  (registers the operators)
from consistency_ops.ops.backend import kernel
from support import second_device

sys.path.append(str(Path(__file__).parents[1] / "simt"))

NAMESPACE = "consistency_ops"
# Complex tensors have no CUDA kernel, and what a compiled model calls instead of capture_rows_ is Python.
_WITHOUT_CUDA_KERNEL = {"modulus_complex_backward", "capture_traced_rows_"}
_SCHEMAS = [schema.name.split("::") for schema in torch._C._jit_get_all_schemas()]
OPERATORS = tuple(sorted({name for space, name in _SCHEMAS if space == NAMESPACE} - _WITHOUT_CUDA_KERNEL))
# The tests of each file that run again with each of KINDS.
AGAIN = {
    "test_modulus.py": {
        "test_values_derivative_and_layout",
        "test_derivative_at_zero_lets_zero_initialised_layers_train",
        "test_keeps_one_bit_an_element",
        "test_input_may_be_overwritten_after_the_call",
        "test_gradients_of_any_layout",
    },
    "test_batch_rms_norm.py": {
        "test_matches_reference",
        "test_evaluation_before_any_training_divides_by_the_floor",
        "test_least_active_channel_is_amplified_at_most_tenfold",
        "test_backward_divides_by_the_same_denominator",
        "test_an_empty_batch_updates_nothing",
        "test_no_channels",
        "test_not_finite_input_shows_in_every_channel",
    },
    "test_capture.py": {
        "test_rows_of_one_call_are_the_reference_sample",
        "test_pooled_calls_are_one_stream_in_blocks",
        "test_a_paused_layer_and_an_empty_input_leave_everything_alone",
        "test_a_restart_removes_the_rows_before_the_mark",
    },
    "test_precondition.py": {
        "test_random_cases_against_float64",
        "test_input_dtype_mix_equals_the_wider_input",
        "test_one_by_one_convolution_equals_linear",
    },
    "test_precondition_determinism.py": {
        "test_foreach_equals_one_call_a_layer",
        "test_precondition_is_position_zero_of_the_foreach_form",
        "test_stages_apart_equal_the_fused_call",
        "test_factor_and_apply_in_one_launch_give_the_same_bits",
        "test_row_counts_use_the_first_rows_only",
        "test_damping_used_is_returned_in_layer_order",
    },
    "test_linalg.py": {"test_small_batches", "test_bad_matrices_leave_the_others_alone"},
    "test_whitening_operators.py": {
        "test_the_native_operators_compute_what_torchs_operations_compute",
        "test_a_lower_triangular_matrix_multiplies_from_the_right",
    },
    "test_same_input.py": {
        "test_the_same_numbers_as_one_copy_of_the_input_each",
        "test_a_covariance_given_several_times",
        "test_a_chunk_that_fails_fails_for_all",
        "test_rows_that_are_counted",
    },
    "test_bad_values.py": {
        "test_nan_or_inf_in_one_unit_spares_the_other_chunks",
        "test_a_nan_row_leaves_the_layer_as_it_is",
        "test_nan_or_inf_in_the_gradient_passes_through",
        "test_nan_or_inf_in_a_bias_gradient",
        "test_a_bad_layer_leaves_the_others_alone",
        "test_singular_chunks_without_damping",
        "test_damping_is_raised_tenfold_at_most_twice",
        "test_a_result_that_overflows_its_dtype_is_not_written",
        "test_empty_gradients",
        "test_no_rows_leave_the_gradient",
        "test_row_counts_out_of_range_read_no_garbage",
    },
}
# Rows that do not count are zero there, and a sum with zeros may be rounded otherwise.
NOT_ON_SECOND = {"test_row_counts_use_the_first_rows_only"}
KINDS = ("library", "torch", "second", "simt", pytest.param("cuda", marks=pytest.mark.gpu))
NO_KERNEL = (torch.float64, torch.complex64, torch.complex128)  # on CUDA
LARGEST = 3000  # elements of a simt sample


class Kernels:
    """The kernels that a test runs on; tests that loop over samples ask for them."""

    def __init__(self, kind: str):
        self.kind = kind

    def choose(self, samples: Iterable, dtypes: Callable, size: Callable) -> list:
        """Return the samples whose ``dtypes`` have kernels; for simt the smallest one of each call, by ``size``."""
        samples = list(samples)
        if self.kind in ("library", "torch"):
            return samples
        if self.kind == "second":
            return [sample for sample in samples if size(sample) <= 50 * LARGEST][:2]
        fit = [sample for sample in samples if torch.float64 not in dtypes(sample)]
        return fit if self.kind == "cuda" else [s for s in fit if size(s) <= 50 * LARGEST][:1]


def is_for(kind: str, parameters: dict) -> bool:
    """Whether a test of these parameters runs again with ``kind``."""
    if kind in ("library", "torch", "second"):
        return True
    if any(value in NO_KERNEL for value in parameters.values() if isinstance(value, torch.dtype)):
        return False
    sizes = [
        value for value in parameters.values() if isinstance(value, tuple) and all(isinstance(v, int) for v in value)
    ]
    return kind == "cuda" or all(math.prod(size) <= LARGEST for size in sizes)


@contextlib.contextmanager
def behind_the_operators(kind: str) -> Iterator[None]:
    if kind == "library":
        yield
        return
    route = {"torch": kernel, "second": _second_route, "simt": _simt_route, "cuda": _cuda_route}[kind]
    library = torch.library.Library(NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that a kernel is overridden: that is the purpose
            for name in OPERATORS:
                library.impl(name, route(name), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


@functools.cache
def _simt_operators():
    import simt_library

    torch.ops.load_library(simt_library.build_operators())
    return torch.ops.consistency_ops_simt


def _simt_route(name: str) -> Callable:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    return getattr(_simt_operators(), name)


def _second_route(name: str) -> Callable:
    second_device.set_up()
    operator = getattr(torch.ops.consistency_ops, name).default

    def run(*args):
        before = len(second_device.waits)
        results = operator(*torch.utils._pytree.tree_map_only(Tensor, second_device.there, args))
        assert len(second_device.waits) == before, (name, second_device.waits[before:])
        return torch.utils._pytree.tree_map_only(Tensor, second_device.here, results)

    return run


def _cuda_route(name: str) -> Callable:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return elsewhere(getattr(torch.ops.consistency_ops, name).default, "cuda")


def elsewhere(operator: torch._ops.OpOverload, device: str) -> Callable:
    """``operator`` on copies of its CPU arguments on ``device``; what it writes and returns comes back."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in operator._schema.arguments)

    def run(*args):
        there: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of each storage, here and there

        def to_device(value):
            if isinstance(value, (list, tuple)):
                return [to_device(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in there:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                there[storage.data_ptr()] = whole, whole.to(device, copy=True)
            bytes_ = there[storage.data_ptr()][1].untyped_storage()
            copy = torch.empty(0, dtype=value.dtype, device=device).set_(bytes_)
            return copy.as_strided(value.shape, value.stride(), value.storage_offset())

        results = operator(*map(to_device, args))
        if writes:
            for here, copy in there.values():
                here.copy_(copy)
        return torch.utils._pytree.tree_map(_to_cpu, results)

    return run


def _to_cpu(result):
    if not isinstance(result, Tensor):
        return result
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype).copy_(result)
