"""OUTPUT0 is the sum of the inputs, OUTPUT1 their difference."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        left = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
        right = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
        if left.shape != right.shape:
            error = pb_utils.TritonError(
                f"INPUT0 has shape {list(left.shape)}, INPUT1 {list(right.shape)}: they must be equal",
                pb_utils.TritonError.INVALID_ARG,
            )
            return pb_utils.InferenceResponse([], error)
        outputs = [pb_utils.Tensor("OUTPUT0", left + right), pb_utils.Tensor("OUTPUT1", left - right)]
        return pb_utils.InferenceResponse(outputs)
