"""Traces as files of JSON lines, one request a line in order of arrival.

Written is ``{"name": "c3.1", "arrival_s": 2.5, "prompt": [[7, 1200], [9, 80]], "output": [10, 300]}``:
pairs of stream and tokens. Read are also the traces Mooncake published, lines of ``timestamp`` in ms,
``input_length``, ``output_length`` and ``hash_ids``, where each id names 512 tokens and all that precedes
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxkv.errors import ConfigError
from jaxkv.replay.trace import Segment, TraceRequest

MOONCAKE_BLOCK_TOKENS = 512


def save_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    """Write one line per request."""
    with path.open("w") as file:
        for request in requests:
            line = {
                "name": request.name,
                "arrival_s": request.arrival_s,
                "prompt": [[segment.stream, segment.num_tokens] for segment in request.prompt],
                "output": [request.output.stream, request.output.num_tokens],
            }
            file.write(json.dumps(line) + "\n")


def load_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, by arrival. Raises ``ConfigError`` that names the line it cannot read."""
    requests: list[TraceRequest] = []
    with _open(path) as file:
        for number, line in enumerate(file):
            if line.strip():
                requests.append(_parse_line(line, number, f"{path}, line {number + 1}"))
    if not requests:
        raise ConfigError(f"{path} holds no request; write one JSON object a line")
    return sorted(requests, key=lambda request: request.arrival_s)


def _open(path: Path) -> Any:
    try:
        return path.open()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}; give an existing file") from error


def _parse_line(line: str, number: int, place: str) -> TraceRequest:
    try:
        fields = json.loads(line)
        if "hash_ids" in fields:
            return _parse_mooncake(fields, number)
        prompt = tuple(Segment(*pair) for pair in fields["prompt"])
        return TraceRequest(fields["name"], float(fields["arrival_s"]), prompt, Segment(*fields["output"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{place} is no request ({error!r}); write name, arrival_s, prompt and output, or timestamp, "
            "input_length, output_length and hash_ids"
        ) from error


def _parse_mooncake(fields: dict[str, Any], number: int) -> TraceRequest:
    """Ids become streams of even numbers; what no id names, the output included, is a stream of its own."""
    own = 2 * number + 1
    prompt = _clip([2 * int(hash_id) for hash_id in fields["hash_ids"]], int(fields["input_length"]), own)
    output = Segment(own, max(1, int(fields["output_length"])))
    return TraceRequest(f"r{number}", fields["timestamp"] / 1e3, prompt, output)


def _clip(streams: Sequence[int], num_tokens: int, own: int) -> tuple[Segment, ...]:
    segments = []
    for stream in streams:
        length = min(MOONCAKE_BLOCK_TOKENS, num_tokens)
        if length > 0:
            segments.append(Segment(stream, length))
            num_tokens -= length
    return (*segments, Segment(own, num_tokens)) if num_tokens else tuple(segments)
