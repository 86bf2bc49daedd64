"""Where a result first departs from what it should be, said in one sentence that a learner can act on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same(
    got: Tensor,
    expected: Tensor,
    *,
    what: str,
    axes: Sequence[str],
    atol: float = 1e-9,
    where: Callable[[tuple[int, ...]], str] | None = None,
) -> None:
    """Fail with the first place, in row-major order, where ``got`` is further than ``atol`` from ``expected``.

    The message speaks of dtypes only if the dtype of ``got`` can be the mistake: see :func:`is_rounding`.

    Args:
        what: what the values are, as the subject of a sentence: ``"the logits"``.
        axes: a name for each dimension: ``("token", "head", "dim")``.
        where: more about a place, from its index: ``lambda index: "block 3, slot 50"``.
    """
    assert isinstance(got, Tensor), f"{what}: expected a tensor, got {type(got).__name__}"
    assert got.shape == expected.shape, f"{what} have shape {list(got.shape)}, expected {list(expected.shape)}"
    wrong = ~torch.isclose(got.to(expected.dtype), expected, atol=atol, rtol=0)
    if not wrong.any():
        return
    index = tuple(torch.nonzero(wrong)[0].tolist())
    place = ", ".join(f"{axis} {number}" for axis, number in zip(axes, index, strict=True))
    more = f" ({where(index)})" if where is not None else ""
    count = f"{int(wrong.sum())} of {wrong.numel()} values differ"
    mine, theirs = f"{got[index]:.6g}", f"{expected[index]:.6g}"
    dtype = f"; its dtype is {got.dtype}, expected {expected.dtype}" if is_rounding(got, expected) else ""
    apart = f" (off by {abs(float(got[index]) - float(expected[index])):.1g})" if mine == theirs else ""
    if wrong.numel() == 1:
        raise AssertionError(f"{what} differs{more}: got {mine}, expected {theirs}{apart}{dtype}")
    raise AssertionError(f"{what} first depart at {place}{more}: got {mine}, expected {theirs}{apart}; {count}{dtype}")


def is_rounding(got: Tensor, expected: Tensor) -> bool:
    """Whether ``got`` differs from ``expected`` by no more than a dtype of fewer bits explains."""
    kinds = got.dtype, expected.dtype
    if not all(kind.is_floating_point for kind in kinds):
        return got.dtype != expected.dtype and torch.equal(got.double().round(), expected.double().trunc())
    if torch.finfo(got.dtype).eps <= torch.finfo(expected.dtype).eps:
        return False
    share = min(1000 * torch.finfo(got.dtype).eps, 0.05)  # the sums of a model's layers round many times
    return torch.allclose(got.double(), expected.double(), rtol=share, atol=share, equal_nan=True)


def assert_same_tokens(got: Sequence[int], expected: Sequence[int], *, what: str) -> None:
    """Fail with the first token that differs, or with the lengths if one list begins the other."""
    for position, (mine, theirs) in enumerate(zip(got, expected)):
        assert mine == theirs, f"{what} first departs at output token {position}: got {mine}, expected {theirs}"
    assert len(got) == len(expected), f"{what} has {len(got)} tokens, expected {len(expected)}"
