"""Seeded calls to an offloading manager, as a connector with several requests would make them.

A request looks its prefix up, loads part of what was found, stores the rest in several calls (now and then
its tail first, or all of it once more) and finishes while transfers are still under way. Requests share
prefixes. What comes next depends on the answers, and on nothing random but the seed.

A call is a list of plain values; ``CALLS`` says what it holds. ``play`` makes it and returns the answer.
"""

import random
from dataclasses import dataclass, field

CALLS = {
    "new": "request, numbers of its block hashes: on_new_request",
    "grow": "request, more block hashes: no call, the request has generated tokens",
    "look": "request, runs, answer: lookup of one key after another up to the first miss; a letter for each, "
    "H hit, P pending, M miss",
    "load": "job, request, runs: prepare_load",
    "loaded": "job: complete_load",
    "store": "job, request, runs, answer: prepare_store; null, or [places of the offered keys that are not "
    "to be stored, keys evicted in order]",
    "stored": "job, success: complete_store of the keys to store",
    "touch": "request, runs: touch",
    "finish": "request: on_request_finished",
    "reset": "jobs under way: reset_cache; vLLM's connector never completes such jobs",
}
FORMS = {
    "run": "group, first hash index, step, count: keys of chunks that end at these hashes of the request",
    "key": "number of the block hash * number of groups + group",
    "positions": "groups whose keys have a position in their request: hash index + 1",
}
NUM_STEPS = 200
ANSWERED = ("look", "store")
Run = tuple[int, int, int, int]


@dataclass
class Setup:
    """What the traffic is made with."""

    seed: int
    capacity: int  # chunks
    threshold: int
    tracker: int
    steps: list[int]  # hashes a chunk covers, by group
    positions: list[int]

    @classmethod
    def of_seed(cls, seed):
        rng = random.Random(seed)
        steps = rng.choice([[1], [1, 1], [1, 2], [2], [2, 1]])
        everyone = list(range(len(steps)))
        return cls(
            seed=seed,
            capacity=rng.choice([4, 6, 8, 8, 12, 12, 16, 16, 24, 32, 64]),
            threshold=[0, 2, 0, 3][seed % 4],
            tracker=rng.choice([12, 24, 64_000]),
            steps=steps,
            positions=[everyone, [], everyone, everyone[-1:], everyone][seed % 5],
        )


@dataclass
class Request:
    number: int
    chain: list[int]
    stored: list[int] = field(default_factory=list)  # chunks offered so far, by group


class PrefixTree:
    """Numbers block hashes so that equal prefixes have equal numbers; popular branches are followed often."""

    def __init__(self, rng, novelty):
        self._rng = rng
        self._novelty = novelty
        self._children = [[]]

    def extend(self, chain, length):
        node, added = (chain[-1] if chain else 0), []
        for _ in range(length):
            children = self._children[node]
            if not children or self._rng.random() < self._novelty:
                node = self._add_child(node)
            else:
                node = children[min(int(self._rng.expovariate(0.8)), len(children) - 1)]
            added.append(node)
        return added

    def branch_off(self, length):
        """A prefix that nobody has."""
        added = [0]
        for _ in range(length):
            added.append(self._add_child(added[-1]))
        return added[1:]

    def _add_child(self, node):
        self._children.append([])
        self._children[node].append(len(self._children) - 1)
        return len(self._children) - 1


class Traffic:
    """``play`` gets every call; ``run`` returns them all, answers included."""

    def __init__(self, setup, play):
        self._setup = setup
        self._play = play
        self._rng = random.Random(setup.seed + 1_000)
        self._tree = PrefixTree(self._rng, self._rng.choice([0.05, 0.15, 0.3]))
        self._calls = []
        self._running = []
        self._jobs = {}  # job -> how its end is called
        self._num_jobs = self._num_requests = 0

    def run(self):
        actions = {
            self._arrive: 6,
            self._load_prefix: 8,
            self._store_next: 30,
            self._store_again: 3,
            self._store_tail_first: 3,
            self._complete_one: 26,
            self._touch: 3,
            self._generate: 4,
            self._finish_one: 7,
            self._reset: 0.25,
        }
        self._arrive()
        for act in self._rng.choices(list(actions), list(actions.values()), k=NUM_STEPS):
            act()
            if not self._running:
                self._arrive()
        self._drain()
        return self._calls

    def _call(self, name, *arguments):
        call = [name, *arguments]
        answer = self._play(call)
        self._calls.append([*call, answer] if name in ANSWERED else call)
        return answer

    def _arrive(self):
        if len(self._running) < 4:
            longest = max(5, self._setup.capacity * 3 // 4)
            self._new(self._tree.extend([], self._rng.randint(2, longest)))
            self._load_prefix(self._running[-1])

    def _new(self, chain):
        self._num_requests += 1
        self._running.append(Request(self._num_requests, chain, [0] * len(self._setup.steps)))
        self._call("new", self._num_requests, list(chain))

    def _generate(self):
        request = self._pick()
        nodes = self._tree.extend(request.chain, self._rng.randint(1, 3))
        request.chain += nodes
        self._call("grow", request.number, nodes)

    def _load_prefix(self, request=None):
        request = request or self._pick()
        runs = []
        for group in range(len(self._setup.steps)):
            whole = self._run_of(group, 0, self._num_chunks(request, group))
            answers = self._call("look", request.number, whole) if whole else ""
            found = len(answers) - len(answers.lstrip("H"))
            runs += self._run_of(group, self._rng.choice([0, 0, self._rng.randint(0, found)]), found)
            request.stored[group] = max(request.stored[group], self._rng.choice([found, 0]))
        if runs and self._rng.random() < 0.7:
            job = self._start("loaded")
            self._call("load", job, request.number, self._expressible(runs))

    def _store_next(self):
        request, runs, ends = self._pick(), [], []
        for group, start in enumerate(request.stored):
            end = min(start + self._rng.randint(1, 6), self._num_chunks(request, group))
            runs += self._run_of(group, start, end)
            ends.append(max(start, end))
        if runs and self._store(request, runs):
            request.stored = ends

    def _store_again(self):
        """Everything offered so far, as a backend is offered that wants whole requests."""
        request = self._pick()
        runs = [run for group, end in enumerate(request.stored) for run in self._run_of(group, 0, end)]
        if runs:
            self._store(request, runs)

    def _store_tail_first(self):
        """The last chunks of one group, then those before them: a window that is filled from behind."""
        request = self._pick()
        group = self._rng.randrange(len(self._setup.steps))
        end = self._num_chunks(request, group)
        middle = self._rng.randint(0, end)
        for start, stop in ((middle, end), (max(0, middle - 3), middle)):
            if stop > start:
                self._store(request, self._run_of(group, start, stop))

    def _store(self, request, runs):
        runs = self._expressible(runs)
        job = self._start("stored")
        answer = self._call("store", job, request.number, runs)
        if answer is None or len(answer[0]) == sum(run[3] for run in runs):
            del self._jobs[job]
        return answer is not None

    def _complete_one(self):
        if self._jobs:
            job = self._rng.choice(list(self._jobs))
            self._complete(job, success=self._rng.random() < 0.85)

    def _complete(self, job, *, success):
        name = self._jobs.pop(job)
        self._call(name, job, *([success] if name == "stored" else []))

    def _touch(self):
        request = self._pick()
        group = self._rng.randrange(len(self._setup.steps))
        end = self._rng.randint(0, self._num_chunks(request, group))
        if end:
            self._call("touch", request.number, self._run_of(group, 0, end))

    def _finish_one(self):
        request = self._pick()
        self._running.remove(request)
        self._call("finish", request.number)

    def _reset(self):
        self._call("reset", sorted(self._jobs))
        self._jobs.clear()
        for request in self._running:
            request.stored = [0] * len(self._setup.steps)

    def _drain(self):
        """End all, then store a whole capacity of new chunks: they evict what is left, in its order."""
        while self._running:
            self._finish_one()
        for job in list(self._jobs):
            self._complete(job, success=True)
        capacity = self._setup.capacity
        self._new(self._tree.branch_off(capacity * self._setup.steps[0]))
        for start in range(0, capacity, 3):
            for _ in range(max(1, self._setup.threshold)):
                self._store(self._running[0], self._run_of(0, start, min(start + 3, capacity)))
        for job in list(self._jobs):
            self._complete(job, success=True)
        self._finish_one()

    def _expressible(self, runs):
        """Where only some groups have positions, a call is about one group, so that its keys are alike."""
        mixed = len(self._setup.positions) not in {0, len(self._setup.steps)}
        chosen = runs[len(self._calls) % len(runs)][0]
        return [run for run in runs if not mixed or run[0] == chosen]

    def _start(self, end):
        self._num_jobs += 1
        self._jobs[self._num_jobs] = end
        return self._num_jobs

    def _run_of(self, group, start, end):
        step = self._setup.steps[group]
        return [[group, (start + 1) * step - 1, step, end - start]] if end > start else []

    def _num_chunks(self, request, group):
        return len(request.chain) // self._setup.steps[group]

    def _pick(self):
        return self._rng.choice(self._running)
