"""Weights in fewer bits: what checkpoints hold, how dense ones are rounded, and the linears that use them.

`codes.py` is the one form that every integer format is read into; `formats.py` reads them; `rounding.py` makes
codes from dense weights; `linears.py` multiplies; `loading.py` decides which of it a linear gets.
"""
