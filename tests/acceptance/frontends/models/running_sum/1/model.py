"""The sum of what a sequence has sent so far, without its sign."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            value, start, sequence = (
                int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0])
                for name in ("IN", "START", "CORRID")
            )
            self.sums[sequence] = (value + (0 if start else self.sums[sequence])) & 0x7FFFFFFF
            output = pb_utils.Tensor("OUT", np.array([[self.sums[sequence]]], np.int32))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
