"""Make the sample model: a small residual network with half of its filters pruned.

    python scripts/make_sample.py [OUT]        (default: scripts/sample/pruned_residual_cnn.onnx)

The network is a stem, three residual stages (the later two with a stride and a 1x1 convolution
on the shortcut, the last with a squeeze-and-excite gate), global average pooling and a linear
classifier, for 96x96 images in batches of any size.

It is made in the order in which pruned networks come to be:

1. random weights (Kaiming) and random, *live* BatchNorm scales and shifts;
2. running statistics fitted to the activations, by one run on random images with every
   BatchNorm in training mode, so that activations keep a magnitude of about one;
3. pruning: half of the filters of every convolution are set to zero. Convolutions that write to
   the same residual stream lose the same filters, so the stream itself can shrink; the other
   convolutions lose filters chosen independently.

BatchNorm shifts, running statistics and biases stay, so a pruned channel is not zero but a
constant, which a simplifier must push into whoever reads the channel before removing it.

Needs numpy, onnx and onnxruntime only. The file is the same on every run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

OUT = Path(__file__).parent / "sample" / "pruned_residual_cnn.onnx"
SEED = 2024
IMAGE = (3, 96, 96)
WIDTHS = (32, 48, 64)  # channels of the residual stream, one entry per stage
GATE_WIDTH = 16
CLASSES = "ant bee beetle butterfly cricket dragonfly fly mantis moth wasp".split()
EPSILON = 1e-5


class Network:
    """The graph under construction: its nodes, its parameters, and who writes to which stream."""

    def __init__(self, seed: int) -> None:
        # RandomState rather than default_rng: its stream never changes between numpy releases.
        self.random = np.random.RandomState(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.parameters: dict[str, np.ndarray] = {}
        self.streams: dict[str, list[str]] = {}  # stream -> convolutions pruned together

    def parameter(self, name: str, value: np.ndarray) -> str:
        """Register an initializer."""
        self.parameters[name] = value.astype(np.float32)
        return name

    def op(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> str:
        """Append a node with one output, named after the node."""
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def conv(
        self,
        name: str,
        x: str,
        shape: tuple[int, int, int],
        *,
        stride: int = 1,
        bias: bool = False,
        stream: str | None = None,
    ) -> str:
        """Append a convolution of shape (outputs, inputs, kernel size)."""
        outputs, inputs, kernel = shape
        deviation = np.sqrt(2 / (inputs * kernel * kernel))
        weight = self.random.normal(0, deviation, (outputs, inputs, kernel, kernel))
        operands = [x, self.parameter(f"{name}.weight", weight)]
        if bias:
            operands.append(self.parameter(f"{name}.bias", self.random.normal(0, 0.1, outputs)))
        self.streams.setdefault(stream or name, []).append(name)
        return self.op(
            "Conv",
            name,
            operands,
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
            strides=[stride, stride],
        )

    def batchnorm(self, name: str, x: str, channels: int) -> str:
        """Append a BatchNorm with a live scale and shift; its statistics are fitted later."""
        values = {
            "weight": self.random.uniform(0.5, 1.5, channels),
            "bias": self.random.normal(0, 0.2, channels),
            "mean": np.zeros(channels),
            "var": np.ones(channels),
        }
        operands = [self.parameter(f"{name}.{key}", value) for key, value in values.items()]
        return self.op("BatchNormalization", name, [x, *operands], epsilon=EPSILON)

    def gate(self, name: str, x: str, channels: int, stream: str) -> str:
        """Append a squeeze-and-excite gate on `x`.

        The gate multiplies a branch of `stream`, so it is pruned with it: a gate that varies on
        a constant channel would bring that channel back to life.
        """
        y = self.op("GlobalAveragePool", f"{name}.pool", [x])
        y = self.conv(f"{name}.reduce", y, (GATE_WIDTH, channels, 1), bias=True)
        y = self.op("Relu", f"{name}.relu", [y])
        y = self.conv(f"{name}.expand", y, (channels, GATE_WIDTH, 1), bias=True, stream=stream)
        y = self.op("Sigmoid", f"{name}.sigmoid", [y])
        return self.op("Mul", f"{name}.mul", [x, y])

    def block(self, name: str, x: str, inputs: int, outputs: int, gated: bool, stream: str) -> str:
        """Append a residual block; where the width changes, it halves the resolution too."""
        stride = 1 if inputs == outputs else 2
        y = self.conv(f"{name}.conv1", x, (outputs, inputs, 3), stride=stride)
        y = self.batchnorm(f"{name}.bn1", y, outputs)
        y = self.op("Relu", f"{name}.relu1", [y])
        y = self.conv(f"{name}.conv2", y, (outputs, outputs, 3), stream=stream)
        y = self.batchnorm(f"{name}.bn2", y, outputs)
        if gated:
            y = self.gate(f"{name}.gate", y, outputs, stream)
        if inputs != outputs:
            x = self.conv(f"{name}.shortcut", x, (outputs, inputs, 1), stride=2, stream=stream)
            x = self.batchnorm(f"{name}.shortcut_bn", x, outputs)
        y = self.op("Add", f"{name}.add", [y, x])
        return self.op("Relu", f"{name}.relu2", [y])

    def fit_statistics(self) -> None:
        """Set every BatchNorm's mean and variance to those of its input, in a single run."""
        model = self.model()
        fitted = []
        for node in model.graph.node:
            if node.op_type == "BatchNormalization":
                # In training mode BatchNorm normalizes with the batch's own statistics; with
                # momentum 0 its further outputs are just these.
                node.attribute.append(helper.make_attribute("training_mode", 1))
                node.attribute.append(helper.make_attribute("momentum", 0.0))
                statistics = [f"{name}.fitted" for name in node.input[3:]]
                node.output.extend(statistics)
                fitted.extend(statistics)
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in fitted
        )
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        images = self.random.normal(0, 1, (8, *IMAGE)).astype(np.float32)
        for name, value in zip(fitted, session.run(fitted, {"image": images}), strict=True):
            # Rounded, so that processors which sum in another order still make the same file.
            rounded = np.round(value.astype(np.float64), 2)
            name = name.removesuffix(".fitted")
            self.parameter(name, np.maximum(rounded, 0.01) if name.endswith(".var") else rounded)

    def prune(self) -> None:
        """Zero half of the filters of every convolution, the same ones along a stream."""
        for names in self.streams.values():
            filters = len(self.parameters[f"{names[0]}.weight"])
            pruned = self.random.permutation(filters)[: filters // 2]
            for name in names:
                self.parameters[f"{name}.weight"][pruned] = 0

    def model(self) -> onnx.ModelProto:
        """The network as an ONNX model."""
        graph = helper.make_graph(
            self.nodes,
            "pruned_residual_cnn",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *IMAGE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])],
            [numpy_helper.from_array(value, name) for name, value in self.parameters.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=9,
            producer_name="make_sample",
            doc_string="Residual network of random weights with half of its filters pruned.",
        )
        helper.set_model_props(
            model,
            {
                "class_names": json.dumps(CLASSES),
                "image_size": json.dumps(IMAGE[1:]),
                "pruning": "half of the filters of every convolution set to zero",
            },
        )
        return model


def build() -> onnx.ModelProto:
    """Build, fit and prune the network."""
    net = Network(SEED)
    # The stem writes the first stage's residual stream, so it is pruned along with it.
    x = net.conv("stem.conv", "image", (WIDTHS[0], IMAGE[0], 3), stride=2, stream="stage1")
    x = net.batchnorm("stem.bn", x, WIDTHS[0])
    x = net.op("Relu", "stem.relu", [x])
    inputs = WIDTHS[0]
    for stage, outputs in enumerate(WIDTHS, start=1):
        gated = stage == len(WIDTHS)
        x = net.block(f"stage{stage}", x, inputs, outputs, gated, stream=f"stage{stage}")
        inputs = outputs
    x = net.op("GlobalAveragePool", "pool", [x])
    x = net.op("Flatten", "flatten", [x], axis=1)
    weight = net.random.normal(0, np.sqrt(2 / inputs), (len(CLASSES), inputs))
    bias = net.random.normal(0, 0.1, len(CLASSES))
    operands = [
        x,
        net.parameter("classifier.weight", weight),
        net.parameter("classifier.bias", bias),
    ]
    net.nodes.append(helper.make_node("Gemm", operands, ["logits"], "classifier", transB=1))
    net.fit_statistics()
    net.prune()
    return net.model()


def main() -> None:
    """Write the model to the path given, or to its place in the tree."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    model = build()
    onnx.checker.check_model(model, full_check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, out)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
