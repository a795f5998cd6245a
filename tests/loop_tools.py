"""What tests ask of the backend under a ``Loop`` besides: which chunks it holds, and that it loses some."""

from collections.abc import Iterator
from contextlib import contextmanager

from connector_loop import Loop, LoopRequest

from jaxkv.keys import GroupId, OffloadKey, make_offload_key
from jaxkv.offload import LookupResult, ReqContext

CTX = ReqContext("somebody")


def key_of(loop: Loop, request: LoopRequest, group: int, end_tokens: int) -> OffloadKey:
    """The key of the chunk that ends at a boundary; of a drafter's, once the next link is known."""
    size = loop.config.hash_block_size
    link = end_tokens // size - 1 + loop.config.groups[group].is_eagle_group
    return make_offload_key(request.block_hashes[link], GroupId(group))


def holds(loop: Loop, request: LoopRequest, group: int, end_tokens: int) -> bool:
    """Whether a chunk can be loaded."""
    answer = loop.spec.get_manager().lookup(key_of(loop, request, group, end_tokens), CTX)
    return answer is LookupResult.HIT


def held(loop: Loop, request: LoopRequest, group: int, chunk_tokens: int | None = None) -> set[int]:
    """Ends of those whole chunks of a request's known tokens that can be loaded."""
    size = chunk_tokens or loop.config.groups[group].block_size
    links = len(request.block_hashes) - loop.config.groups[group].is_eagle_group
    num_named = links * loop.config.hash_block_size
    return {end for end in range(size, num_named + 1, size) if holds(loop, request, group, end)}


def forget(loop: Loop, request: LoopRequest, group: int, ends) -> None:
    """Drop chunks of the backend, as a failed read of them does."""
    manager = loop.spec.get_manager()
    keys = [key_of(loop, request, group, end) for end in ends]
    manager.prepare_load(keys, CTX)
    manager.complete_load(keys, CTX, success=False)


def crowd(loop: Loop, tag: int) -> None:
    """Offer the backend more chunks than its pool holds, and lose them: all that can go is gone then."""
    manager = loop.spec.get_manager()
    for group in range(len(loop.config.groups)):
        for count in (16, 8, 4, 2, 1):
            keys = [
                make_offload_key(bytes([group, tag, count, index]) * 4, GroupId(group))
                for index in range(count)
            ]
            output = manager.prepare_store(keys, CTX)
            if output is not None:
                manager.complete_store(output.keys_to_store, CTX, success=False)


@contextmanager
def no_room(loop: Loop) -> Iterator[None]:
    """The backend refuses every store."""
    manager = loop.spec.get_manager()
    manager.prepare_store, manager.prepare_stores = lambda keys, ctx: None, lambda offers: None
    yield
    del manager.prepare_store, manager.prepare_stores


def preempt_in_step(loop: Loop, request: LoopRequest) -> None:
    """Make a step before whose scheduling a request loses its blocks."""
    schedule = loop.schedule

    def preempt_and_schedule():
        loop.preempt(request)
        return schedule()

    loop.schedule = preempt_and_schedule
    loop.step()
    loop.schedule = schedule


def note_loads(loop: Loop, group: int) -> list[list[int]]:
    """A list that grows with every load: the blocks it writes in a group, -1 where nothing is moved."""
    noted, submit = [], loop.worker.submit_load

    def note(job, kv_caches):
        noted.extend(blocks.block_ids.tolist() for blocks in job.blocks if blocks.group == group)
        return submit(job, kv_caches)

    loop.worker.submit_load = note
    return noted


def skipped(loop: Loop, group: int) -> dict[str, int]:
    """Chunks of a group that were not written, by reason."""
    counts = loop.connector.get_stats().groups[group].skipped_chunks
    return {reason.value: count for reason, count in counts.items() if count}
