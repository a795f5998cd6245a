"""Plays the calls of policy_traffic to a manager of ours, and answers as the traces are written."""

from hashlib import blake2b

from jaxkv.keys import BlockHash, GroupId, KeyRun, KeyRuns, make_offload_key
from jaxkv.offload import LookupResult, ReqContext

LETTERS = {LookupResult.HIT: "H", LookupResult.MISS: "M", LookupResult.HIT_PENDING: "P"}


class Player:
    """Keys go out as runs in groups that have positions, else one by one. Hashes have 16 bytes or 32."""

    def __init__(self, manager, setup):
        self.manager = manager
        self._setup = setup
        self._hash_bytes = 16 + 16 * (setup.seed % 2)
        self._contexts = {}
        self._chains = {}
        self._jobs = {}
        self._numbers = {}

    def play(self, call):
        name, *arguments = call
        return getattr(self, name)(*arguments)

    def new(self, request, nodes):
        self._contexts[request] = ReqContext(str(request))
        self._chains[request] = []
        self.grow(request, nodes)
        self.manager.on_new_request(self._contexts[request])

    def grow(self, request, nodes):
        self._chains[request] += [self._hash_of(node) for node in nodes]

    def look(self, request, runs):
        keys, ctx = self._keys_of(request, runs), self._contexts[request]
        prefix = self.manager.lookup_prefix(keys, ctx)
        letters = "".join(LETTERS[self.manager.lookup(key, ctx)] for key in keys[: prefix.num_found + 1])
        assert LETTERS[prefix.worst] == ("P" if "P" in letters else "H")
        return letters

    def load(self, job, request, runs):
        keys, ctx = self._keys_of(request, runs), self._contexts[request]
        self.manager.prepare_load(keys, ctx)
        self._jobs[job] = (self.manager.complete_load, keys, ctx)

    def loaded(self, job):
        self._complete(job, success=True)

    def store(self, job, request, runs):
        keys, ctx = self._keys_of(request, runs), self._contexts[request]
        output = self.manager.prepare_store(keys, ctx)
        if output is None:
            return None
        return [self._start_store(job, keys, output.keys_to_store, ctx), self._named(output.evicted_keys)]

    def store_together(self, offers):
        """Several stores in one call. Answers what is skipped of each, and all that is evicted."""
        asked = [(self._keys_of(request, runs), self._contexts[request]) for _, request, runs in offers]
        output = self.manager.prepare_stores(asked)
        skipped = [
            None if to_store is None else self._start_store(job, keys, to_store, ctx)
            for (job, *_), (keys, ctx), to_store in zip(offers, asked, output.keys_to_store, strict=True)
        ]
        return skipped, self._named(output.evicted_keys)

    def stored(self, job, success):
        self._complete(job, success=success)

    def touch(self, request, runs):
        self.manager.touch(self._keys_of(request, runs), self._contexts[request])

    def finish(self, request):
        self.manager.on_request_finished(self._contexts[request])

    def reset(self, jobs):
        """Jobs under way end at once: until then they hold their slots here, but not with vLLM."""
        self.manager.reset_cache()
        for job in jobs:
            self._complete(job, success=True)

    def _start_store(self, job, keys, keys_to_store, ctx):
        """Answers the places of the keys that are not stored."""
        if keys_to_store:
            self._jobs[job] = (self.manager.complete_store, keys_to_store, ctx)
        wanted = set(keys_to_store)
        assert list(keys_to_store) == [key for key in keys if key in wanted]
        return [place for place, key in enumerate(keys) if key not in wanted]

    def _named(self, keys):
        return [self._numbers[key] for key in keys]

    def _complete(self, job, *, success):
        complete, keys, ctx = self._jobs.pop(job)
        complete(keys, ctx, success=success)

    def _keys_of(self, request, runs):
        keys = [KeyRun(self._chains[request], GroupId(group), *rest) for group, *rest in runs]
        if not {group for group, *_ in runs} <= set(self._setup.positions):
            return [key for run in keys for key in run]
        return KeyRuns(keys) if len(keys) > 1 else keys[0]

    def _hash_of(self, node):
        block_hash = BlockHash(blake2b(node.to_bytes(8, "big"), digest_size=self._hash_bytes).digest())
        num_groups = len(self._setup.steps)
        for group in range(num_groups):
            self._numbers[make_offload_key(block_hash, GroupId(group))] = node * num_groups + group
        return block_hash
