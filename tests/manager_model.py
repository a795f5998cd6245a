"""What the host backend's manager must decide, recomputed from dicts and lists at every step.

Recency follows vLLM 0.32's ``CPUOffloadingManager`` with its LRU and ARC policies; pins, quarantine and slabs
that change owner are jaxkv's own. Only the pool's choice of slots is taken from the real ``SlotPool``.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from jaxkv.keys import get_offload_group
from jaxkv.slabs import slot_stride

PENDING, READABLE, FORGOTTEN = "pending", "readable", "forgotten"


@dataclass(eq=False)
class ModelChunk:
    size: int
    slot: tuple[int, int]
    slab: int
    state: str = PENDING
    uses: int = 1


@dataclass
class ModelRequest:
    order: list = field(default_factory=list)
    positions: dict = field(default_factory=dict)
    inserted: set = field(default_factory=set)
    reused: set = field(default_factory=set)
    missed: set = field(default_factory=set)

    def see(self, key, position):
        if key not in self.order:
            self.order.append(key)
        if self.positions.get(key) is None:
            self.positions[key] = position

    def head_to_tail(self):
        groups = sorted({get_offload_group(key) for key in self.order})
        ordered = []
        for group in groups:
            part = [key for key in self.order if get_offload_group(key) == group]
            ordered += self.sort(part)
        return self.sort(ordered)

    def sort(self, part):
        if any(self.positions[key] is None for key in part):
            return part
        return sorted(part, key=self.positions.__getitem__)


class ModelLRU:
    """Ranks alone decide."""

    def __init__(self, capacity):
        self.chunks = OrderedDict()

    def insert(self, key):
        self.chunks[key] = None

    def remove(self, key, *, evicted):
        del self.chunks[key]

    def touch(self, key, *, readable):
        return self.use(key)

    def end_request(self, key, *, inserted, reused):
        return self.use(key)

    def use(self, key):
        if key not in self.chunks:
            return False
        self.chunks.move_to_end(key)
        return True

    def miss(self, key):
        pass

    def next_victim(self, could_go, planned):
        return next((key for key in self.chunks if key in could_go), None)

    def end_eviction(self):
        pass

    def reset(self):
        assert not self.chunks


class ModelARC:
    """T1 and T2, the ghosts of both, and the target size of T1."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.target = 0.0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict() for _ in range(4))

    def insert(self, key):
        self.t1[key] = None
        self.b1.pop(key, None)
        self.b2.pop(key, None)

    def remove(self, key, *, evicted):
        part, ghosts = (self.t1, self.b1) if key in self.t1 else (self.t2, self.b2)
        del part[key]
        if evicted:
            ghosts[key] = None

    def touch(self, key, *, readable):
        if key in self.t1:
            del self.t1[key]
            (self.t2 if readable else self.t1)[key] = None
        elif key in self.t2:
            self.t2.move_to_end(key)
        else:
            self.miss(key)
            return False
        return True

    def end_request(self, key, *, inserted, reused):
        if not (inserted or reused) or (key not in self.t1 and key not in self.t2):
            return False
        part = self.t1 if key in self.t1 else self.t2
        del part[key]
        (self.t2 if reused else part)[key] = None
        return True

    def miss(self, key):
        if key in self.b1:
            self.target = min(self.target + max(1, len(self.b2) / len(self.b1)), self.capacity)
            self.b1.move_to_end(key)
        elif key in self.b2:
            self.target = max(self.target - max(1, len(self.b1) / len(self.b2)), 0)
            self.b2.move_to_end(key)

    def next_victim(self, could_go, planned):
        t1_size = len(self.t1) - sum(key in self.t1 for key in planned)
        parts = [self.t2, self.t1] if t1_size < int(self.target) else [self.t1, self.t2]
        return next((key for part in parts for key in part if key in could_go), None)

    def end_eviction(self):
        for ghosts in (self.b1, self.b2):
            while len(ghosts) > self.capacity:
                ghosts.popitem(last=False)

    def reset(self):
        assert not self.t1
        assert not self.t2
        self.__init__(self.capacity)


class ManagerModel:
    """Answers what ``HostOffloadingManager`` must, for sizes by group over a pool of its own."""

    def __init__(self, pool, slot_bytes, policy, threshold=0):
        self.pool = pool
        self.slot_bytes = slot_bytes
        self.strides = {size: slot_stride(size) for size in slot_bytes}
        self.make_policies = lambda: {
            stride: policy(pool.num_slabs * pool.slots_per_slab(stride)) for stride in self.strides.values()
        }
        self.policies = self.make_policies()
        self.threshold = threshold
        self.offers = {}
        self.chunks = {}
        self.requests = {}
        self.ranks = {}
        self.slab_ranks = {}
        self.clock = 0

    # -- recency --------------------------------------------------------------------------------------------

    def policy_of(self, key):
        return self.policies[self.stride_of(key)]

    def stride_of(self, key):
        return self.strides[self.slot_bytes[get_offload_group(key)]]

    def rank(self, key):
        self.clock += 1
        self.ranks[key] = self.clock
        self.slab_ranks[self.chunks[key].slab] = self.clock

    def touch(self, keys):
        for key in reversed(list(keys)):
            readable = key in self.chunks and self.chunks[key].state == READABLE
            if self.policy_of(key).touch(key, readable=readable):
                self.rank(key)

    def finish(self, req):
        record = self.requests.pop(req, ModelRequest())
        for key in reversed(record.head_to_tail()):
            reused = key in record.reused
            inserted = key in record.inserted and not reused
            if self.policy_of(key).end_request(key, inserted=inserted, reused=reused):
                self.rank(key)

    # -- loads ----------------------------------------------------------------------------------------------

    def can_load(self):
        return [key for key, chunk in self.chunks.items() if chunk.state == READABLE]

    def prepare_load(self, req, places):
        record = self.requests.setdefault(req, ModelRequest())
        for key, position in places:
            self.chunks[key].uses += 1
            record.see(key, position)
            if key not in record.inserted:
                record.reused.add(key)
        return [self.chunks[key].slot[0] for key, _ in places]

    def complete_load(self, keys, *, success):
        for key in keys:
            if not success and self.chunks[key].state == READABLE:
                self.forget(key, evicted=False)
            self.end_use(key)

    # -- stores ---------------------------------------------------------------------------------------------

    def prepare_store(self, req, places):
        """Keys to store, offsets of their slots and evicted keys; or ``None``."""
        offered = dict(reversed(places))
        offered = {key: offered[key] for key in dict(places)}
        to_store = self.select(offered)
        self.note(req, offered, to_store)
        if any(key in self.chunks for key in to_store):
            return None
        slots = {}
        self.take_free(to_store, slots)
        victims = self.plan([key for key in to_store if key not in slots], offered, slots)
        if victims is None:
            for slot in slots.values():
                self.give_back(slot)
            return None
        for key in victims:
            self.forget(key, evicted=True)
        for policy in self.policies.values() if victims else ():
            policy.end_eviction()
        self.take_free(to_store, slots)
        for key in to_store:
            self.chunks[key] = ModelChunk(self.stride_of(key), slots[key], self.pool.slab_of(slots[key][0]))
            self.policy_of(key).insert(key)
            self.rank(key)
            self.requests[req].inserted.add(key)
        return to_store, [slots[key][0] for key in to_store], victims

    def select(self, offered):
        for key in offered:
            self.offers[key] = self.offers.get(key, 0) + 1
        absent = [key for key in offered if key not in self.chunks or self.chunks[key].state == FORGOTTEN]
        return [key for key in absent if self.offers[key] >= self.threshold]

    def note(self, req, offered, to_store):
        record = self.requests.setdefault(req, ModelRequest())
        ready = [key for key in offered if key in self.chunks and self.chunks[key].state == READABLE]
        missed = [key for key in to_store if key not in record.missed]
        for key in reversed(missed):
            self.policy_of(key).miss(key)
        record.missed.update(missed)
        for key, position in offered.items():
            if key in to_store or key in ready:
                record.see(key, position)
        record.reused.update(key for key in ready if key not in record.inserted)

    def take_free(self, to_store, slots):
        for key in to_store:
            if key not in slots:
                slot = self.pool.reserve(self.slot_bytes[get_offload_group(key)])
                if slot is not None:
                    slots[key] = slot

    def plan(self, lacking, offered, slots):
        victims, spare = [], dict.fromkeys(self.policies, 0)
        closed = {self.chunks[key].slab for key in offered if key in self.chunks}
        closed |= {self.pool.slab_of(slot[0]) for slot in slots.values()}
        for key in lacking:
            stride = self.stride_of(key)
            if spare[stride]:
                spare[stride] -= 1
                continue
            idle = {key for key, chunk in self.chunks.items() if not chunk.uses} - set(offered) - set(victims)
            victim = self.policies[stride].next_victim(idle, victims)
            slab = self.coldest_slab(stride, closed)
            if slab is not None and (victim is None or self.slab_ranks[slab] < self.ranks[victim]):
                victims += self.chunks_in(slab)
                closed.add(slab)
                spare[stride] = self.pool.slots_per_slab(stride) - 1
            elif victim is not None:
                victims.append(victim)
                closed.add(self.chunks[victim].slab)
            else:
                return None
        return victims

    def coldest_slab(self, stride, closed):
        slabs = {chunk.slab for chunk in self.chunks.values() if chunk.size != stride} - closed
        slabs -= {chunk.slab for chunk in self.chunks.values() if chunk.uses}
        return min(slabs, key=self.slab_ranks.__getitem__, default=None)

    def chunks_in(self, slab):
        """Chunks of a slab in the order in which they came there."""
        return [key for key, chunk in self.chunks.items() if chunk.slab == slab]

    def complete_store(self, keys, *, success):
        for key in keys:
            if self.chunks[key].state == PENDING:
                if success:
                    self.chunks[key].state = READABLE
                else:
                    self.forget(key, evicted=False)
            self.end_use(key)

    # -- ends -----------------------------------------------------------------------------------------------

    def forget(self, key, *, evicted):
        self.policy_of(key).remove(key, evicted=evicted)
        self.chunks[key].state = FORGOTTEN
        if not self.chunks[key].uses:
            self.drop(key)

    def end_use(self, key):
        chunk = self.chunks[key]
        chunk.uses -= 1
        if not chunk.uses and chunk.state == FORGOTTEN:
            self.drop(key)

    def drop(self, key):
        chunk = self.chunks.pop(key)
        self.give_back(chunk.slot)
        if not self.chunks_in(chunk.slab):
            del self.slab_ranks[chunk.slab]

    def give_back(self, slot):
        assert self.pool.free([slot[0]], [slot[1]])

    def reset(self, in_order):
        """``in_order``: readable chunks in the order in which their slots come back."""
        found = {key: chunk.state for key, chunk in self.chunks.items()}
        assert set(in_order) == {key for key, state in found.items() if state == READABLE}
        for key in (*in_order, *(key for key, state in found.items() if state == PENDING)):
            self.forget(key, evicted=False)
        for policy in self.policies.values():
            policy.reset()
        self.requests.clear()

    # -- questions ------------------------------------------------------------------------------------------

    def state(self, key):
        return self.chunks[key].state if key in self.chunks else FORGOTTEN
