"""A small, real serving loop over paged hybrid caches."""

from jaxkv.serving.build import build_engine
from jaxkv.serving.config import EngineConfig, EngineStats
from jaxkv.serving.engine import LLMEngine
from jaxkv.serving.model import KVCaches, Model, StepBatch
from jaxkv.serving.request import (
    Request,
    RequestMetrics,
    RequestOutput,
    RequestStatus,
    SamplingParams,
)
from jaxkv.serving.sizing import DEFAULT_PREFILL_SHAPES, divide_device_bytes

__all__ = [
    "DEFAULT_PREFILL_SHAPES",
    "EngineConfig",
    "EngineStats",
    "KVCaches",
    "LLMEngine",
    "Model",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "RequestStatus",
    "SamplingParams",
    "StepBatch",
    "build_engine",
    "divide_device_bytes",
]
