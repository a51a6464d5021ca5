"""The python backend: `model.py` with the `triton_python_backend_utils` interface, unchanged from Triton."""

from enginehouse_backends.python_model.backend import PythonBackend

__all__ = ["PythonBackend"]
