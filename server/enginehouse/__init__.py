"""One server for every model that you have. Importing this package loads no framework."""

__version__ = "0.1.0"
