"""Small clients of the v2 protocol: arrays in, arrays out. `AsyncClient` is the same for asyncio.

    with Client("localhost:8000") as client:
        embedding = client.infer("text_embedding", {"text": [["a cat"]]})["embedding"]

For gRPC and shared memory use `tritonclient`, for language models the `openai` package: both work unchanged.
"""

from enginehouse_client.async_client import AsyncClient
from enginehouse_client.client import Client
from enginehouse_client.messages import ServerError

__all__ = ["AsyncClient", "Client", "ServerError"]
