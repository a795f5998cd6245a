"""Who has something to store, and whether that is planned before a step or while it runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.jobs import JobTable
from jaxkv.connector.request_state import Tenure
from jaxkv.connector.store_plan import can_wait
from jaxkv.connector.stores import StorePlanner
from jaxkv.offload.base import TransferJob


@final
class StoreQueue:
    """Tenures with chunks that became complete, each until ``planner`` has planned for it.

    What the coming step may overwrite is planned before it. The rest, which is nearly all while requests
    decode, waits until the step runs, and costs nothing where an accelerator computes meanwhile.
    """

    def __init__(self, caches: ChunkedCaches, planner: StorePlanner, jobs: JobTable) -> None:
        self._caches = caches
        self._planner = planner
        self._jobs = jobs
        self._has_states = any(map(caches.is_state, caches.groups))
        self._due: dict[Tenure, None] = {}
        self._following: dict[Tenure, None] = {}
        self._without_room: dict[Tenure, None] = {}

    def add(self, tenure: Tenure) -> None:
        """It has something to store, or has ended."""
        self._due[tenure] = None

    def __iter__(self) -> Iterator[Tenure]:
        """Who has not been planned for. Who was refused for want of room has."""
        return iter(self._due | self._following)

    def plan_before_step(self, last_step: Container[str]) -> tuple[TransferJob, ...]:
        """Jobs of those who cannot wait; ``last_step`` names the requests that the last step was planned for.

        Who could wait once and was not asked for then is among them. With several workers everybody is, for
        they learn of jobs when a step begins, and with recurrent states, which the step writes on.
        """
        waited, self._following = self._following, {}
        due, self._due = self._due | waited, {}
        for tenure in due:
            if tenure.ctx.req_id not in last_step:
                # A step went by without it: what it gave back then may be overwritten.
                tenure.previous_tokens = tenure.begun_tokens
        if self._jobs.num_workers == 1 and not self._has_states:
            self._following = {
                tenure: None for tenure in due if tenure not in waited and can_wait(self._caches, tenure)
            }
        return self._plan(tenure for tenure in due if tenure not in self._following)

    def plan_behind_step(self) -> tuple[TransferJob, ...]:
        """Jobs that may read what the step, which was begun, leaves behind."""
        following, self._following = self._following, {}
        return self._plan(tenure for tenure in following if not tenure.has_ended)

    def offer_again(self) -> None:
        """A job has ended, so there may be room for what was refused."""
        self._due.update(dict.fromkeys(tenure for tenure in self._without_room if not tenure.has_ended))
        self._without_room.clear()

    def clear(self) -> None:
        """Forget everyone."""
        self._due.clear()
        self._following.clear()
        self._without_room.clear()

    def _plan(self, due: Iterable[Tenure]) -> tuple[TransferJob, ...]:
        """Plan for those of ``due`` that run. Who is refused is due again when a job has ended."""
        running = [tenure for tenure in due if tenure.running]
        jobs = self._planner.plan(running)
        for tenure in running:
            if tenure.was_refused and not tenure.has_ended:
                waiting = self._without_room if len(self._jobs) else self._due
                waiting[tenure] = None
        return tuple(jobs)
