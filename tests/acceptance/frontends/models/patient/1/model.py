"""Works for IN milliseconds unless its client leaves; OUT says how many requests were left so far."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.num_left = 0

    def execute(self, requests):
        responses = []
        for request in requests:
            end = time.monotonic() + int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0]) / 1000
            while time.monotonic() < end and not request.is_cancelled():
                time.sleep(0.005)
            self.num_left += request.is_cancelled()
            output = pb_utils.Tensor("OUT", np.array([self.num_left], np.int32))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
