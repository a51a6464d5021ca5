"""Sentences to token ids with the tokenizer that MiniLM was trained with.

The sentences of all requests are tokenized in one call; each request is padded to its own longest sentence,
so that a short question doesn't pay for a long document that came at the same time.
"""

import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MAX_LENGTH = 512  # the encoder has no more positions


class TritonPythonModel:
    def initialize(self, args):
        path = Path(args["model_repository"]) / args["model_version"] / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.enable_truncation(MAX_LENGTH)
        self.tokenizer.no_padding()

    def execute(self, requests):
        texts_by_request = [
            [text.decode(errors="replace") for text in self.texts(request)] for request in requests
        ]
        encodings = iter(self.tokenizer.encode_batch([text for texts in texts_by_request for text in texts]))
        return [self.pad([next(encodings) for _ in texts]) for texts in texts_by_request]

    def texts(self, request):
        return pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)

    def pad(self, encodings):
        longest = max((len(encoding.ids) for encoding in encodings), default=0)
        token_ids = np.zeros((len(encodings), longest), dtype=np.int64)
        mask = np.zeros_like(token_ids)
        for row, encoding in enumerate(encodings):
            token_ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("input_ids", token_ids), pb_utils.Tensor("attention_mask", mask)]
        )
