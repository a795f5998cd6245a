"""The table of cache layouts that must round-trip byte for byte."""

from __future__ import annotations

from jaxkv.testing.attention_cases import attention_cases
from jaxkv.testing.case_parts import Sizes
from jaxkv.testing.dense_cases import dense_cases
from jaxkv.testing.page_oracle import LayoutCase
from jaxkv.testing.quantized_cases import latent_cases, quantized_cases
from jaxkv.testing.state_cases import shared_cases, state_cases


def layout_cases(sizes: Sizes) -> tuple[LayoutCase, ...]:
    """Every row of the table at these sizes. ``tokens`` must be a multiple of 4, for kernel blocks."""
    return (
        *attention_cases(sizes),
        *latent_cases(sizes),
        *quantized_cases(sizes),
        *state_cases(sizes),
        *shared_cases(sizes),
        *dense_cases(sizes),
    )


LAYOUT_CASES = layout_cases(Sizes())


def layout_case(name: str) -> LayoutCase:
    """The case called ``name``; ``KeyError`` if there is none."""
    return {case.name: case for case in LAYOUT_CASES}[name]
