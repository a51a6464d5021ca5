"""A small client of the v2 protocol: arrays in, arrays out, one connection. Needs numpy alone.

    with Client("localhost:8000") as client:
        embedding = client.infer("text_embedding", {"text": [["a cat"]]})["embedding"]

For gRPC and shared memory use `tritonclient`, for language models the `openai` package: both work unchanged.
"""

from enginehouse_client.client import Client, ServerError

__all__ = ["Client", "ServerError"]
