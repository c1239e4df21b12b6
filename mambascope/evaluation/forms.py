"""Forms in which a classifier can run on the CPU, to be timed side by side.

A form is what a user can do with a model: as it is, frozen, compiled, exported, in another precision. B images.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.models.export import export_program, has_stages, quiet, stages, to_onnx
from mambascope.models.frozen import freeze, unfreeze
from mambascope.models.two_stage import is_two_stage


class Unavailable(Exception):
    """A form that a model has not got, or not here; the message says why."""


class Classifier:
    """One form of one model.

    Args:
        look: Images to what a one-stage model answers, or to what a second look needs.
        second: Images and what the first look left to the second answer; None for a one-stage model.
        choose: What a first look left, and rows of it, to that of these rows alone.
    """

    def __init__(
        self,
        look: Callable[[Tensor], Any],
        second: Callable[[Tensor, Any], Any] | None = None,
        choose: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        self.look, self.second, self.choose = look, second, choose

    def run(self, x: Tensor, refined: int) -> Any:
        """Answers for images [B, C, H, W], of which the first `refined` get a second look."""
        first = self.look(x)
        if self.second is None or refined == 0:
            return first
        if refined == len(x):
            return self.second(x, first)
        assert self.choose is not None
        return self.second(x[:refined], self.choose(first, torch.arange(refined)))


def logits_of(result: Any) -> Tensor:
    """Logits [B, C] float32 of what any form gives."""
    if isinstance(result, Tensor):
        return result.float()
    return result.logits.float() if hasattr(result, "logits") else torch.from_numpy(result[0])


def shares_of_batches(batch: int, share: float) -> list[int]:
    """How many images of each of a few batches are refined so that it is `share` of them all.

    Batches too small for a share are taken together: every second image of single ones for a half.
    """
    count = 1 if batch * share == round(batch * share) or batch >= 8 else round(1 / min(share, 1 - share))
    ends = [round((i + 1) * batch * share + 1e-9) for i in range(count)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _classifier(model: Any, compiler: Callable[[Any], Any] = lambda call: call) -> Classifier:
    if not is_two_stage(model):
        return Classifier(compiler(model))
    fine = compiler(model.forward_fine)
    return Classifier(compiler(model.forward_coarse), fine, lambda state, rows: state.index_select(rows))


def _copy(model: nn.Module) -> Any:
    return copy.deepcopy(model).eval()


def eager(model: nn.Module, images: Tensor) -> Classifier:
    """As PyTorch runs it."""
    return _classifier(unfreeze(_copy(model)))


def frozen(model: nn.Module, images: Tensor) -> Classifier:
    """With packed parameters, see :func:`mambascope.freeze`."""
    try:
        return _classifier(freeze(_copy(model)))
    except (ValueError, RuntimeError) as error:
        raise Unavailable(str(error)) from None


def compiled(model: nn.Module, images: Tensor) -> Classifier:
    """By ``torch.compile``."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # every batch size is a graph of its own
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than eager times under this name
    return _classifier(_copy(model), lambda call: torch.compile(call, dynamic=False))


def bf16(model: nn.Module, images: Tensor) -> Classifier:
    """Parameters and images in bfloat16."""
    inner = _classifier(_copy(model).bfloat16())
    second = inner.second
    return Classifier(
        lambda x: inner.look(x.bfloat16()),
        None if second is None else lambda x, state: second(x.bfloat16(), state),
        inner.choose,
    )


def int8(model: nn.Module, images: Tensor) -> Classifier:
    """Weights of the linear layers in int8, quantised activations, by PyTorch's dynamic quantisation."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(linear) < 2:
        raise Unavailable("no linear layers but the head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _classifier(torch.ao.quantization.quantize_dynamic(_copy(model), {nn.Linear}, torch.qint8))


def _export(model: Any, images: Tensor) -> Iterator[tuple[str, Any]]:
    """Name and ONNX program of every stage, one after the other."""
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        raise Unavailable("needs onnx and onnxscript: pip install 'mambascope[export]'")
    model = unfreeze(_copy(model))
    images = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    if has_stages(model):
        for name, (module, inputs) in stages(model, images).items():
            if name != "two_stage":
                outputs: Any = module.outputs
                yield name, to_onnx(export_program(module, inputs), outputs)
        return
    batch = {0: torch.export.Dim("batch", min=1)}
    with quiet():
        program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    yield "model", program


_Load = Callable[[Path], Callable[[list[Any]], list[Any]]]


def _exported(model: nn.Module, images: Tensor, load: _Load) -> Classifier:
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, program in _export(model, images):
            path = Path(folder, f"{name}.onnx")
            program.save(str(path))
            calls[name] = load(path)
    if "fine" not in calls:
        (call,) = calls.values()
        return Classifier(lambda x: call([x.numpy()]))
    coarse, fine = calls["coarse"], calls["fine"]
    both = bool(getattr(model, "coarse_weight", 0))

    def second(x: Tensor, left: list[Any]) -> list[Any]:
        logits, _, *state = left
        return fine([x.numpy(), *state, *([logits] if both else [])])

    return Classifier(lambda x: coarse([x.numpy()]), second, lambda left, rows: [v[: len(rows)] for v in left])


def onnx(model: nn.Module, images: Tensor) -> Classifier:
    """Exported, by ONNX Runtime."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise Unavailable("needs onnxruntime: pip install 'mambascope[export]'")
    import onnxruntime

    def load(path: Path) -> Callable[[list[Any]], list[Any]]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return lambda values: session.run(None, dict(zip(names, values, strict=True)))

    return _exported(model, images, load)


def openvino(model: nn.Module, images: Tensor) -> Classifier:
    """Exported, by OpenVINO."""
    if importlib.util.find_spec("openvino") is None:
        raise Unavailable("needs openvino: pip install openvino")
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}

    def load(path: Path) -> Callable[[list[Any]], list[Any]]:
        program = ov.Core().compile_model(ov.convert_model(str(path)), "CPU", settings)
        return lambda values: list(program(values).values())

    return _exported(model, images, load)


FORMS: dict[str, Callable[[nn.Module, Tensor], Classifier]] = {
    form.__name__: form for form in (eager, frozen, compiled, onnx, openvino, bf16, int8)
}
"""By name: what makes the form of a model for images [B, C, H, W], or raises :class:`Unavailable`."""
