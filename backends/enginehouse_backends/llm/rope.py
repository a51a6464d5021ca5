"""Rotary frequencies of every kind that config.json can name: default, linear, dynamic, llama3, yarn.

Gives one table of cosines and sines for all positions; who applies it is attention's matter.
"""

from __future__ import annotations

import math

import torch

from enginehouse.errors import Unsupported
from enginehouse_backends.llm.architecture import RopeSettings


def rope_table(settings: RopeSettings, max_positions: int) -> torch.Tensor:
    """[max_positions, rotary_dim] float32: rotary_dim/2 cosines, then as many sines.

    Raises Unsupported for a kind that is not known here.
    """
    frequencies, magnitude = _frequencies(settings, max_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=1).contiguous()


def _frequencies(settings: RopeSettings, max_positions: int) -> tuple[torch.Tensor, float]:
    base = _inverse_frequencies(settings.theta, settings.rotary_dim)
    match settings.kind:
        case "default":
            return base, 1.0
        case "linear":
            return base / float(settings.settings["factor"]), 1.0
        case "dynamic":
            return _inverse_frequencies(_dynamic_theta(settings, max_positions), settings.rotary_dim), 1.0
        case "llama3":
            return _llama3(base, settings), 1.0
        case "yarn":
            return _yarn(base, settings)
        case "longrope":
            return _longrope(base, settings, max_positions)
    raise Unsupported(f"rotary embedding of type '{settings.kind}' is not supported")


def _inverse_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)


def _dynamic_theta(settings: RopeSettings, max_positions: int) -> float:
    # NTK-aware scaling; fixed at the longest context served, so that cached keys stay valid
    factor = float(settings.settings["factor"])
    trained = float(settings.settings["max_position_embeddings"])
    stretch = factor * max(max_positions, trained) / trained - (factor - 1)
    return settings.theta * float(stretch ** (settings.rotary_dim / (settings.rotary_dim - 2)))


def _llama3(base: torch.Tensor, settings: RopeSettings) -> torch.Tensor:
    numbers = settings.settings
    factor, trained = float(numbers["factor"]), float(numbers["original_max_position_embeddings"])
    low, high = float(numbers["low_freq_factor"]), float(numbers["high_freq_factor"])
    wavelengths = 2 * math.pi / base
    blend = (trained / wavelengths - low) / (high - low)
    smoothed = (1 - blend) * base / factor + blend * base
    long, short = wavelengths > trained / low, wavelengths < trained / high
    return torch.where(long, base / factor, torch.where(short, base, smoothed))


def _longrope(base: torch.Tensor, settings: RopeSettings, max_positions: int) -> tuple[torch.Tensor, float]:
    # arXiv 2402.13753. One table for all: the long factors as soon as longer contexts than the trained one
    # are served, as a cached key can't be rotated anew when its sequence grows past that.
    numbers = settings.settings
    trained, longest = (
        float(numbers["original_max_position_embeddings"]),
        float(numbers["max_position_embeddings"]),
    )
    factors = numbers["long_factor" if max_positions > trained else "short_factor"]
    factor = float(numbers.get("factor") or longest / trained)
    magnitude = numbers.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return base / torch.tensor(factors, dtype=torch.float32), float(magnitude)


def _yarn(base: torch.Tensor, settings: RopeSettings) -> tuple[torch.Tensor, float]:
    # arXiv 2309.00071; defaults are those of its reference
    numbers, dim = settings.settings, settings.rotary_dim
    trained = float(numbers.get("original_max_position_embeddings") or numbers["max_position_embeddings"])
    factor = float(numbers["factor"])

    def dimension_of(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(settings.theta))

    low, high = (
        dimension_of(float(numbers.get("beta_fast") or 32)),
        dimension_of(float(numbers.get("beta_slow") or 1)),
    )
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp), _yarn_magnitude(settings, factor)


def _yarn_magnitude(settings: RopeSettings, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numbers = settings.settings
    if numbers.get("attention_factor") is not None:
        return float(numbers["attention_factor"])
    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return scale(float(numbers["mscale"])) / scale(float(numbers["mscale_all_dim"]))
    return scale(1.0)
