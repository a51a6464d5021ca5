"""Encoders and classifiers as Hugging Face saves them: a folder is dropped in and served, tokenizer included.

The task comes from the architecture's head; tasks.py lists what each takes and gives. Inputs are texts of any
length with one element a row, so ordinary batching joins them, and the instance groups them by length.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from enginehouse.backend import Backend, HostKind, LoadContext, MemoryNeeds, Model, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument
from enginehouse.types import Tensor
from enginehouse_backends.artifacts import total_bytes
from enginehouse_backends.parameters import Parameters, default_threads
from enginehouse_backends.signature import InputChecker, Signature, check_config, complete_config
from enginehouse_backends.transformers_task.folder import Folder, read_folder
from enginehouse_backends.transformers_task.tasks import RUNNER_BY_TASK, TaskRunner

DEFAULT_MAX_BATCH_SIZE = 32
DTYPE_BY_NAME = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TransformersBackend(Backend):
    name = "transformers"
    default_filename = "config.json"

    def host_kind(self, config: ModelConfig) -> HostKind:
        on_gpu = any(group.kind == group.KIND_GPU for group in config.instance_group)
        return HostKind.DEVICE if on_gpu else HostKind.PROCESS

    def complete_config(self, context: LoadContext) -> ModelConfig:
        options = context.backend_options
        default_size = int(options.get("default-max-batch-size", DEFAULT_MAX_BATCH_SIZE))
        return complete_config(context.config, signature(read_folder(context)), default_size)

    def memory_needs(self, context: LoadContext) -> MemoryNeeds:
        return MemoryNeeds(weights_bytes=total_bytes(*read_folder(context).weight_files))

    def load(self, context: LoadContext) -> Model:
        return TransformersModel(context)


def signature(folder: Folder) -> Signature:
    runner = RUNNER_BY_TASK[folder.task]
    return Signature(str(folder.path), runner.inputs, runner.outputs(folder), batches=True)


class TransformersModel(Model):
    """The weights, once a device; tokenizers are the instances' own."""

    def __init__(self, context: LoadContext) -> None:
        self.context = context
        self.folder = read_folder(context)
        self.signature = signature(self.folder)
        check_config(context.config, self.signature)
        self._lock = threading.Lock()  # guards _model_by_device while instances are made
        self._model_by_device: dict[str, Any] = {}
        if all(group.kind != group.KIND_GPU for group in context.config.instance_group):
            self._model("cpu")  # so that broken weights are an error of loading

    def create_instance(self, placement: Placement) -> TensorInstance:
        device = placement.device
        if device == "model":
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        runner_class = RUNNER_BY_TASK[self.folder.task]
        try:
            runner = runner_class(self.folder, self._model(device), device)
        except Exception as problem:
            raise InvalidArgument(
                f"can't load the tokenizer or image processor of {self.folder.path}: {problem}"
            ) from problem
        return TransformersInstance(self, runner)

    def _model(self, device: str) -> Any:
        with self._lock:
            if device not in self._model_by_device:
                self._model_by_device[device] = self._load(device)
            return self._model_by_device[device]

    def _load(self, device: str) -> Any:
        model_class = getattr(transformers, RUNNER_BY_TASK[self.folder.task].model_class)
        try:
            model, report = model_class.from_pretrained(
                self.folder.path,
                dtype=self._dtype(device),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=self.context.config.serving.llm.trust_remote_code,
                output_loading_info=True,
            )
        except EnginehouseError:
            raise
        except Exception as problem:
            files = ", ".join(path.name for path in self.folder.weight_files)
            raise InvalidArgument(f"can't load {self.folder.path} (config.json, {files}): {problem}") from problem
        missing = sorted(key for key in report["missing_keys"] if "position_ids" not in key and "pooler" not in key)
        if missing:  # transformers would go on with random ones
            raise InvalidArgument(
                f"{self.folder.path}: the weights for the task {self.folder.task} lack {', '.join(missing[:5])}"
            )
        return model.eval().to(device)

    def _dtype(self, device: str) -> Any:
        """What the config asks for, else the weights' own; FP32 on a CPU, where half precision is no faster."""
        asked = self.context.config.serving.llm.dtype
        if asked and asked != "auto":
            if asked not in DTYPE_BY_NAME:
                raise InvalidArgument(
                    f"model '{self.context.name}': unknown serving.llm.dtype '{asked}'; known are auto, "
                    f"{', '.join(DTYPE_BY_NAME)}"
                )
            return DTYPE_BY_NAME[asked]
        return torch.float32 if device == "cpu" else "auto"

    def close(self) -> None:
        self._model_by_device.clear()


class TransformersInstance(TensorInstance):
    def __init__(self, model: TransformersModel, runner: TaskRunner) -> None:
        config = model.context.config
        self._name = model.context.name
        self._runner: TaskRunner | None = runner
        self._checker = InputChecker(self._name, model.signature.inputs)
        self._datatype_by_output = {spec.name: spec.datatype for spec in model.signature.outputs}
        self._configured = [output.name for output in config.output]
        asked = Parameters(config).number("INTRA_OP_THREAD_COUNT")
        self._num_threads: int | None = asked or default_threads(config)

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        assert self._runner is not None, "a bug: the instance is closed"
        self._checker.check(inputs)
        unknown = [name for name in outputs if name not in self._datatype_by_output]
        if unknown:
            raise InvalidArgument(
                f"unexpected inference output '{unknown[0]}' for model '{self._name}', allowed outputs are: "
                f"{', '.join(self._datatype_by_output)}"
            )
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
            self._num_threads = None  # it stays: an instance runs in one thread
        try:
            with torch.inference_mode():
                results = self._runner.run(inputs)
        except EnginehouseError:
            raise
        except Exception as problem:
            raise Internal(f"transformers, model '{self._name}': {problem}") from problem
        wanted = outputs or self._configured
        return {name: Tensor.from_numpy(name, results[name], self._datatype_by_output[name]) for name in wanted}

    def close(self) -> None:
        self._runner = None
