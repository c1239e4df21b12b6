"""CUDA graphs for inference at small batch, where launching kernels costs more than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def graphed(model: Callable[[Tensor], Tensor], example: Tensor, *, warmup: int = 3) -> Callable[[Tensor], Tensor]:
    """Captures a model's inference in a CUDA graph for one input shape.

    A Vim of 24 layers launches several hundred kernels; replaying a graph takes one launch. What is captured must not
    depend on the numbers: no early exit, no ``.item()``. So capture a plain Vim, or one stage of a MambaScope, and
    leave the decision outside. Parameters are read when the graph runs: other weights in the same memory need no new
    capture.

    Args:
        model: Module or function from an image batch [B, C, H, W] to one tensor; a module must be in eval mode.
        example: Input with the shape, dtype and device that will be used.
        warmup: Runs before the capture, in which kernels are compiled and chosen.

    Returns:
        A function of a tensor like `example`. Its result is a new tensor; no gradients flow.

    Raises:
        ValueError: `example` is not on a CUDA device, the module is in training mode, or later an input of another
            shape or dtype.
    """
    if not example.is_cuda:
        raise ValueError(f"example must be on a CUDA device, got {example.device}")
    if isinstance(model, torch.nn.Module) and model.training:
        raise ValueError("model must be in eval mode")
    static = example.detach().clone()
    with torch.cuda.device(example.device), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(1, warmup)):
                model(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)

    def replay(x: Tensor) -> Tensor:
        if x.shape != static.shape or x.dtype != static.dtype:
            raise ValueError(f"x must be {list(static.shape)} {static.dtype}, got {list(x.shape)} {x.dtype}")
        static.copy_(x)
        graph.replay()
        return output.clone()

    return replay
