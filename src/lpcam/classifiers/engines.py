"""Engines that run a frozen network: torch, a runtime of its ONNX file, or ``torch.compile``.

On a CPU, ONNX Runtime and OpenVINO are faster than torch, since they fuse activations into
convolutions. An engine is used where its outputs agree with those of torch.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lpcam.classifiers.classifier import PROBE_SIZE, Classifier, SameConvolution
from lpcam.runtime.errors import ClassifierError, import_extra
from lpcam.runtime.files import digest_tensors, write_bytes
from lpcam.runtime.resources import available_threads, native_bfloat16
from lpcam.training.saved_network import shallow_copy

Engine = Literal["torch", "onnxruntime", "openvino", "compile"]
Precision = Literal["float32", "bfloat16", "float16"]
Run = Callable[[Tensor], Sequence[Tensor]]  #: Images (B, c, H, W) to the outputs of a network.
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Extra that installs each runtime of ONNX files, together with ``onnx``, which exports them."""
LARGEST_ERROR, MEAN_ERROR = 1e-3, 1e-4
"""Accepted differences from torch's outputs, relative to the largest value of an output."""
_OPSET = 18


def choose_engine(
    wanted: Literal["auto"] | Engine, device: torch.device, precision: Precision = "float32"
) -> Engine:
    """The engine to use: ``auto`` is ONNX Runtime on a CPU where it is installed, else torch.

    Raises LpcamError if the wanted engine is not installed, and ClassifierError if it cannot
    compute on the device or in the precision.
    """
    if precision == "bfloat16" and device.type == "cpu" and not native_bfloat16():
        raise ClassifierError(
            "maps.precision is bfloat16, but this processor has no bfloat16 arithmetic, so passes "
            "would be slower; use float32"
        )
    if wanted == "auto":
        usable = device.type == "cpu" and precision == "float32"
        there = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx"))
        return "onnxruntime" if usable and there else "torch"
    if wanted in EXTRAS:
        if device.type != "cpu":
            raise ClassifierError(
                f"run.engine is {wanted}, which computes on the CPU, but run.device is {device}; "
                "use torch or compile"
            )
        for name in (wanted, "onnx"):
            import_extra(name, EXTRAS[wanted], f"run.engine {wanted} needs {name}")
        able = {"onnxruntime": ("float32",), "openvino": ("float32", "bfloat16")}[wanted]
        if precision not in able:
            raise ClassifierError(
                f"run.engine {wanted} computes in {' or '.join(able)}, but maps.precision is "
                f"{precision}; use another engine or precision"
            )
    return wanted


class EngineNetwork(nn.Module):
    """A network that an engine runs: images (B, c, H, W) to its first output.

    ``layers`` are the names of further outputs: hooks on modules of these names see them.
    """

    def __init__(self, run: Run, layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.run, self.layers = run, tuple(layers)
        self.layout = getattr(run, "layout", torch.channels_last)  #: Of images, for speed.
        for name in self.layers:
            place: nn.Module = self
            for part in name.split("."):
                if part not in place._modules:
                    place.add_module(part, nn.Identity())
                place = place.get_submodule(part)

    def forward(self, images: Tensor) -> Tensor:
        """The first output."""
        first, *others = self.run(images)
        for name, output in zip(self.layers, others, strict=True):
            self.get_submodule(name)(output)
        return first

    def forward_intermediates(self, images: Tensor, **_: Any) -> list[Tensor]:
        """All outputs, as timm's backbones give their maps."""
        return list(self.run(images))


class _Outputs(nn.Module):
    """A network whose outputs, and those of named layers below a module, are one tuple."""

    def __init__(
        self, network: nn.Module, call: Callable[[Tensor], Any], below: nn.Module, layers: Any
    ) -> None:
        super().__init__()
        self.network, self.call = network, call
        self.layers, self._kept = tuple(layers), dict[str, Tensor]()
        for name in self.layers:
            below.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self._kept[name] = output

        return keep

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.call(images)
        first = (found,) if isinstance(found, Tensor) else tuple(found)
        return first + tuple(self._kept.pop(name) for name in self.layers)


def accelerated(
    classifier: Classifier,
    engine: Engine,
    file: Path | None = None,
    images: Callable[[], Sequence[Tensor]] = tuple,
    *,
    layers: Sequence[str] = (),
    precision: Precision = "float32",
) -> Classifier:
    """A classifier for inference whose backbone an engine runs, equal up to rounding.

    Args:
        classifier: it is copied, and its batch norms are folded.
        engine: as :func:`choose_engine` gives it.
        file: where the ONNX file of the backbone is kept; one that is there is used as it is.
        images: gives normalised batches (B, 3, H, W) on which a new file is compared with torch.
        layers: early layers of the backbone whose outputs hooks shall see.
        precision: of the passes; of ONNX files that of the runtime.

    Raises:
        ClassifierError: if the backbone cannot be exported, or its outputs differ.
    """
    twin = classifier.folded()
    if engine != "torch":
        call, below = shallow_copy(twin), twin.backbone
        outputs = _Outputs(call, call.features, below, layers)
        twin.backbone = _network_of(outputs, engine, file, images, precision)
        twin.gives_tokens = False
    return twin


def accelerated_network(
    network: nn.Module,
    engine: Engine,
    file: Path | None = None,
    images: Callable[[], Sequence[Tensor]] = tuple,
    call: Callable[[Tensor], Any] | None = None,
) -> nn.Module:
    """A network in evaluation mode, or what ``call`` makes of images with it, run by an engine.

    Arguments and errors are those of :func:`accelerated`.
    """
    if engine == "torch":
        return network
    outputs = _Outputs(network, call or network, network, ())
    return _network_of(outputs, engine, file, images, "float32")


def _network_of(
    outputs: _Outputs,
    engine: Engine,
    file: Path | None,
    images: Callable[[], Sequence[Tensor]],
    precision: Precision,
) -> EngineNetwork:
    """The network of an engine, compared with torch where it is new."""
    outputs.eval().requires_grad_(False)
    if engine == "compile":
        run: Run = torch.compile(outputs, dynamic=True)
        known = False
    else:
        known = file is not None and file.is_file()
        data = file.read_bytes() if known and file is not None else _exported(outputs)
        try:
            run = _RUNTIMES[engine](data, precision)
        except Exception as error:  # runtimes raise errors of their own
            where = f"; delete {file}" if known else ""
            raise ClassifierError(f"it cannot be loaded ({_first_line(error)}){where}") from error
    if not known:
        _compare(outputs, run, images() if precision == "float32" else ())
        if file is not None and engine != "compile":
            write_bytes(file, data)
    return EngineNetwork(run, outputs.layers)


def file_name(network: nn.Module, layers: Sequence[str] = ()) -> str:
    """Name of the ONNX file of a network, by its weights."""
    return f"{digest_tensors(network.state_dict(), {'layers': list(layers)})}.onnx"


def _compare(outputs: nn.Module, run: Run, images: Sequence[Tensor]) -> None:
    """Raise ClassifierError where an engine's outputs differ from torch's."""
    for batch in images:
        with torch.inference_mode():
            try:
                pairs = list(zip(outputs(batch), run(batch), strict=True))
            except Exception as error:  # runtimes and the compiler may raise anything
                raise ClassifierError(f"it cannot run ({_first_line(error)})") from error
        for expected, found in pairs:
            if expected.shape != found.shape:
                raise ClassifierError(f"it gives {tuple(found.shape)} for {tuple(expected.shape)}")
            off = (expected - found).abs() / expected.abs().max().clamp_min(1e-12)
            largest, mean = float(off.max()), float(off.mean())
            if not (largest <= LARGEST_ERROR and mean <= MEAN_ERROR):  # also where one is NaN
                size = " x ".join(map(str, batch.shape[-2:]))
                raise ClassifierError(
                    f"its outputs differ from torch's at {size} pixels by {largest:.1g} of the "
                    f"largest value, on average {mean:.1g} (accepted are {LARGEST_ERROR:g} and "
                    f"{MEAN_ERROR:g})"
                )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


class _SameOperator(torch.autograd.Function):
    """A "same" convolution as one operator of ONNX, which pads as the size of the image asks."""

    @staticmethod
    def forward(_: Any, images: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        # Of a trace only the shape counts.
        sides = (-(-n // s) for n, s in zip(images.shape[-2:], rest[1], strict=True))
        return images.new_zeros(len(images), len(weight), *sides)

    @staticmethod
    def symbolic(graph: Any, images: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        strides, dilations, groups = rest
        attributes = {"strides_i": strides, "dilations_i": dilations, "group_i": groups}
        given = (images, weight, bias)
        return graph.op("Conv", *given, auto_pad_s="SAME_UPPER", **attributes)


class _Same(nn.Module):
    """What stands for a "same" convolution while a network is exported."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        conv = self.convolution
        bias = conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
        rest = list(conv.stride), list(conv.dilation), conv.groups
        found: Tensor = _SameOperator.apply(images, conv.weight, bias, *rest)
        return found


def _exported(outputs: _Outputs) -> bytes:
    """A network as ONNX, for batches of any number and size.

    torch's older exporter, because it takes a second where the newer one takes ten.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for module in list(outputs.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SameConvolution):
                replaced.append((module, name, child))
                setattr(module, name, _Same(child.convolution))
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.no_grad(),
            tempfile.TemporaryDirectory() as folder,
        ):
            file = Path(folder, "network.onnx")
            first = next(outputs.parameters())
            torch.onnx.export(
                outputs,
                (first.new_zeros(2, 3, *PROBE_SIZE),),
                file,
                dynamo=False,
                opset_version=_OPSET,
                input_names=["images"],
                dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}},
            )
            return file.read_bytes()
    except Exception as error:  # the exporter raises whatever one of its passes meets
        raise ClassifierError(f"it cannot be exported ({_first_line(error)})") from error
    finally:
        logging.disable(level)
        for module, name, child in replaced:
            setattr(module, name, child)


class _Runtime(ABC):
    """Runs an ONNX file; made for each number of threads that torch has in a calling thread."""

    layout = torch.contiguous_format

    def __init__(self, data: bytes, precision: Precision) -> None:
        self._data, self._precision, self._lock = data, precision, threading.Lock()
        self._made = dict[int, Any]()
        self._here()  # what cannot be loaded is told now

    def _here(self) -> Any:
        with self._lock:
            threads = torch.get_num_threads()
            if threads not in self._made:
                self._made[threads] = self._make(threads)
            return self._made[threads]

    @abstractmethod
    def _make(self, threads: int) -> Any:
        """What runs the file with some threads."""

    @abstractmethod
    def __call__(self, images: Tensor) -> list[Tensor]:
        """The outputs for images (B, c, H, W)."""


class _OnnxRuntime(_Runtime):
    """ONNX Runtime, with as many threads as torch has."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        given = {"images": images.contiguous().numpy()}
        return [torch.from_numpy(output) for output in self._here().run(None, given)]

    def _make(self, threads: int) -> Any:
        runtime = import_extra("onnxruntime", "onnx", "run.engine onnxruntime needs it")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        return runtime.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])


class _OpenVino(_Runtime):
    """OpenVINO: images side by side, or one with all threads of torch."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        compiled = self._here()
        found = compiled.create_infer_request().infer({0: images.contiguous().numpy()})
        return [torch.from_numpy(found[place]) for place in range(len(compiled.outputs))]

    def _make(self, threads: int) -> Any:
        runtime = import_extra("openvino", "openvino", "run.engine openvino needs it")
        core = runtime.Core()
        streams = available_threads() if threads == 1 else 1
        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self._precision],
            "INFERENCE_NUM_THREADS": threads * streams,
            "NUM_STREAMS": streams,
        }
        return core.compile_model(core.read_model(model=self._data), "CPU", settings)


_RUNTIMES: dict[str, Callable[[bytes, Precision], Run]] = {
    "onnxruntime": _OnnxRuntime,
    "openvino": _OpenVino,
}
