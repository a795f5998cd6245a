"""The loop with speculation: steps that compute drafted tokens, of which some are rejected."""

from __future__ import annotations

from collections.abc import Callable

from connector_loop import Loop, LoopRequest

GARBAGE = -7
"""What a rejected token leaves: it was computed from tokens that are not the request's."""


class DraftLoop(Loop):
    """Each decode step computes ``num_drafts`` more tokens; ``accept`` says how many of them are kept.

    A group of a drafter holds for each token what depends on the next one too: for the last computed token
    that is a guess, which the next step writes anew.
    """

    def __init__(self, *, num_drafts=3, accept: Callable[[], int] = lambda: 1, **options):
        super().__init__(**options)
        self.num_drafts, self.accept = num_drafts, accept

    def next_tokens(self, request: LoopRequest) -> int:
        count = super().next_tokens(request)
        left = request.max_new_tokens - (request.num_tokens - request.num_prompt_tokens) - 1
        is_decode = request.num_tokens - request.num_computed_tokens == 1
        return count + min(self.num_drafts, left) if is_decode else count

    def forward(self, request: LoopRequest, count: int) -> None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + count
        known = request.num_tokens
        for _ in range(min(self.accept(), end - known)):
            self.sample(request)
        kept = min(end, request.num_tokens)
        self.compute_tokens(request, start, kept)
        for group, table in zip(self.config.groups, request.tables, strict=True):
            for layer in group.layer_names:
                for place in range(kept - group.is_eagle_group, end):
                    self.caches[layer][table[place // group.block_size], place % group.block_size] = GARBAGE
        request.num_computed_tokens = kept
        if kept == request.num_tokens:
            self.sample(request)

    def compute_tokens(self, request: LoopRequest, start: int, end: int) -> None:
        for group, table in zip(self.config.groups, request.tables, strict=True):
            if group.is_eagle_group and start and table[(start - 1) // group.block_size] is not None:
                self.write(request, group, table, range(start - 1, start))
            self.check_reads(request, group, table, start)
            self.write(request, group, table, range(start, end))
