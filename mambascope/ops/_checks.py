"""Argument checks shared by the public functions of this package."""

from __future__ import annotations

from torch import Tensor


def check_tensor(
    name: str, tensor: Tensor | None, letters: str, sizes: tuple[int, ...], like: Tensor | None = None
) -> None:
    """Raises ValueError unless `tensor` is floating point, has exactly these `sizes` and is on the device of `like`.

    Args:
        name: Argument name for the message.
        tensor: What was passed.
        letters: The shape in letters, e.g. ``"[B, L, E]"``, for the message.
        sizes: Expected sizes.
        like: Tensor that sets the device.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == sizes
        and tensor.is_floating_point()
        and (like is None or tensor.device == like.device)
    ):
        return  # first, because it runs a dozen times per call
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {letters}, got {type(tensor).__name__}")
    if tensor.dim() != len(sizes) or any(have != want for have, want in zip(tensor.shape, sizes, strict=True)):
        raise ValueError(f"{name} must be {letters} = {list(sizes)}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the first argument is, got {tensor.device}")


def check_sequence(name: str, tensor: Tensor, letters: str) -> None:
    """Raises ValueError unless `tensor` is floating point with three dimensions and at least one token."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 3:
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be {letters}, got {got}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one token, got shape {list(tensor.shape)}")
