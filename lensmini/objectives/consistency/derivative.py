"""The derivative of a network along a direction of all its inputs, three ways, and a check of each against float64.

| method | evaluations | needs | use |
| --- | --- | --- | --- |
| ``forward`` | one, about twice the work | plain attention (``backend="math"``) | default; any dtype |
| ``central`` | three | float32 throughout | any model: fused attention, compiled, sharded |
| ``semi`` | one of ``forward`` and two more | both of the above | where the derivative in time is what overflows (rCM) |

A finite difference divides a small difference by a small step. bfloat16 keeps 8 bits: on a mixture of Gaussians the error is
10 % at best and everything at a step of 0.001, where float32 has 2e-5, so anything narrower than float32 is refused. Forward
mode in bfloat16 has 0.6 % there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lensmini.paths import check_same_shape
from lensmini.reduction import holds

__all__ = ["DerivativeError", "check_derivative", "directional_derivative"]

Method = Literal["forward", "central", "semi"]
Function = Callable[..., Tensor]


def directional_derivative(
    function: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    method: Method = "forward",
    step: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Value and derivative ``d/ds function(primals + s tangents)`` at s = 0, from one call.

    MeanFlow: primals ``(x, t, r)``, tangents ``(v, 1, 0)``. Continuous consistency: ``(x, t)``, ``(v, 1)``.

    - ``"forward"``: ``torch.func.jvp``; exact. On :class:`lensmini.nn.LensTransformer` attention turns to plain operations
      by itself; fused attention has no forward mode, and FSDP2 only in newer versions of torch.
    - ``"central"``: ``(function(+step) - function(-step)) / (2 step)``; error step^2, plus rounding over step.
    - ``"semi"``: forward mode in the first primal and central differences in the others (rCM, arXiv 2510.08431).

    Dropout must draw the same in every evaluation.

    Args:
        function: of the primals, to one tensor; closed over everything else. Called with shifted primals, also a little
            outside [0, 1] where a time is near an end.
        primals: floating point tensors.
        tangents: as many, each in the shape of its primal.
        method: see above.
        step: length of the shift, in units of the tangents; only, and always, with finite differences. A smooth field in
            float32 is best between 1e-3 and 1e-2, a network that embeds 1000 t between ``2**-16`` and ``2**-13``
            (:func:`check_derivative` measures it); a power of two shifts times without rounding. A wide step smooths a
            network that is rough in time (docs/consistency.md).

    Returns:
        The value, which carries gradients to parameters and primals, and the derivative, which carries none.

    Raises:
        ValueError: if numbers, shapes or dtypes do not fit, ``method`` is unknown, ``step`` is missing or superfluous, a
            finite difference would be taken in less than float32, or the function has no forward mode.

    Example:
        >>> x, t = torch.tensor([3.0]), torch.tensor([2.0])
        >>> directional_derivative(lambda x, t: x * t**2, (x, t), (torch.ones(1), torch.ones(1)))
        (tensor([12.]), tensor([16.]))
    """
    primals, tangents = tuple(primals), tuple(tangents)
    _check(primals, tangents, method, step)
    if method == "forward":
        return _forward(function, primals, tangents)
    assert step is not None
    if method == "central":
        value = _not_rounded(function(*primals))
        return value, _difference(function, primals, tangents, step)
    first, others = primals[0], primals[1:]
    value, along = _forward(lambda x: function(x, *others), (first,), tangents[:1])
    rest = _difference(lambda *moved: function(first, *moved), others, tangents[1:], step)
    return _not_rounded(value), along + rest


class DerivativeError(NamedTuple):
    """One row of :func:`check_derivative`."""

    method: Method
    """The method that was measured."""
    dtype: torch.dtype
    """The dtype of function and inputs."""
    step: float | None
    """The step of a finite difference."""
    error: float
    """``|derivative - exact| / |exact|`` over all elements; NaN where the method refused."""
    refused: str
    """Why there is no number; empty where there is one."""


def check_derivative(
    make: Callable[[torch.dtype], Function],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    steps: Sequence[float] = (2**-10, 2**-13, 2**-16),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    methods: Sequence[Method] = get_args(Method),
    reference_step: float = 2**-17,
) -> list[DerivativeError]:
    """Measure every method in every dtype against float64 before trusting a long run to one of them.

    The reference uses no forward mode: two central differences in float64, extrapolated to step 0 (Richardson).

    Args:
        make: from a dtype to the function in that dtype, for example ``lambda dtype: copy.deepcopy(model).to(dtype)``.
        primals: inputs of the function, of the size of real ones; cast to each dtype, but what has at most one axis is time
            and stays float32 at least.
        tangents: directions, as of :func:`directional_derivative`.
        steps: steps of the finite differences.
        dtypes: what to measure.
        methods: what to measure.
        reference_step: of the reference; the default suits functions of 1000 t.

    Returns:
        A row for each method, dtype and step, with its relative error or the reason of its refusal.

    Raises:
        ValueError: if numbers or shapes do not fit, or the exact derivative is zero or not finite.

    Example:
        >>> x = torch.tensor([[0.5, 1.0]])
        >>> rows = check_derivative(lambda dtype: torch.sin, (x,), (torch.ones_like(x),), methods=("forward",))
        >>> [row.error < bound for row, bound in zip(rows, (1e-6, 1e-2))]
        [True, True]
    """
    wide, along = (tuple(x.double() for x in tensors) for tensors in (primals, tangents))
    _check(wide, along, "central", reference_step)
    exact = make(torch.float64)
    coarse, fine = (_difference(exact, wide, along, reference_step / division) for division in (1, 2))
    expected = (4 * fine - coarse) / 3
    size = float(torch.linalg.vector_norm(expected))
    if not 0 < size < math.inf:
        raise ValueError(f"function: expected a derivative that is finite and not zero, its norm in float64 is {size}")
    rows = []
    for dtype in dtypes:
        time_dtype = torch.promote_types(dtype, torch.float32)
        cast = [tuple(x.to(dtype if x.ndim > 1 else time_dtype) for x in tensors) for tensors in (primals, tangents)]
        function = make(dtype)
        for method in methods:
            for step in steps if method != "forward" else (None,):
                try:
                    _, found = directional_derivative(function, *cast, method=method, step=step)
                    error, refused = float(torch.linalg.vector_norm(found.double() - expected)) / size, ""
                except ValueError as reason:
                    error, refused = math.nan, str(reason)
                rows.append(DerivativeError(method, dtype, step, error, refused))
    return rows


def _check(primals: Sequence[Tensor], tangents: Sequence[Tensor], method: str, step: float | None) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if not primals or len(primals) != len(tangents):
        raise ValueError(
            f"tangents: expected one for each of one or more primals, got {len(tangents)} for {len(primals)}"
        )
    for index, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        check_same_shape(f"tangents[{index}]", tangent, f"primals[{index}]", primal)
        if tangent.dtype != primal.dtype:
            raise ValueError(f"tangents[{index}]: expected the dtype of its primal {primal.dtype}, got {tangent.dtype}")
    if method == "forward":
        if step is not None:
            raise ValueError(f"step: expected None with method='forward', got {step}")
        return
    if step is None or not 0 < step < math.inf:
        raise ValueError(f"step: expected a positive number with method={method!r}, got {step}")
    if method == "semi" and len(primals) < 2:
        raise ValueError("primals: expected two or more with method='semi': the first is differentiated exactly")
    for index, primal in enumerate(primals):
        if _narrow(primal.dtype):
            raise ValueError(_too_narrow(f"primals[{index}]", str(primal.dtype)))
    device = primals[0].device.type
    if torch.is_autocast_enabled(device) and _narrow(torch.get_autocast_dtype(device)):
        raise ValueError(_too_narrow("autocast", str(torch.get_autocast_dtype(device))))


def _narrow(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits < 32


def _too_narrow(name: str, dtype: str) -> str:
    return (
        f"{name}: expected float32 or float64 for a finite difference, got {dtype}: a difference of two rounded values "
        "has no correct digit left at a useful step; compute in float32, or use method='forward'"
    )


def _float32_at_least(value: Tensor) -> Tensor:
    if _narrow(value.dtype):
        raise ValueError(_too_narrow("function's result", str(value.dtype)))
    return value


def _not_rounded(value: Tensor) -> Tensor:
    """Refuse a result of narrow weights that was cast to the dtype of the input: its numbers give it away.

    Looks at the values, on a device too, since narrow weights live there; beside three evaluations it costs nothing.
    """
    many = _float32_at_least(value).count_nonzero() >= 64
    for dtype in (torch.bfloat16, torch.float16):
        if not holds(~many | (value.to(dtype).to(value.dtype) != value).any()):
            raise ValueError(_too_narrow("function's result", f"{dtype} numbers in {value.dtype}"))
    return value


def _difference(function: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor], step: float) -> Tensor:
    with torch.no_grad():
        ahead, behind = (
            _float32_at_least(function(*(x + side * step * d for x, d in zip(primals, tangents, strict=True))))
            for side in (1, -1)
        )
        return (ahead - behind) / (2 * step)


def _forward(function: Function, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    try:
        # Forward mode refuses views that repeat memory, such as one time expanded to a batch.
        dense = (tuple(x.contiguous() for x in tensors) for tensors in (primals, tangents))
        result = torch.func.jvp(function, *dense)
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if any(sign in text for sign in ("forward AD", "forward-mode", "jvp", "setup_context", "functorch")):
            raise ValueError(
                "function: has an operation without forward-mode derivative: fused attention (use plain operations, "
                "backend='math' of lensmini.nn or sdpa_kernel(SDPBackend.MATH) elsewhere), a hand-written autograd function, "
                "or FSDP in older versions of torch (pytorch issue 182641). method='central' in float32 needs none: "
                f"{text.splitlines()[0]}"
            ) from error
        raise
    return result[0], result[1].detach()
