"""The block manager of the exact cache inside vLLM's own cache manager, under random schedules."""

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_attentionpack.attention.state import in_flight_tokens
from vllm_attentionpack.kv_cache.exact import ExactWindowSpec
from vllm_attentionpack.ops.exact import NULL_BLOCK, locate_exact

BLOCK, EXACT_BLOCK = 16, 4
MAX_MODEL_LEN = 400
STEPS = 2500


@dataclass
class Worker:
    """What a model runner keeps of a request, and what it wrote where."""

    rows: dict[str, list[int]] = field(default_factory=dict)
    content: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)

    def write(self, request_id: str, start: int, stop: int) -> None:
        for position in range(start, stop):
            block = self.rows[request_id][position // EXACT_BLOCK]
            if block != NULL_BLOCK:
                self.content[block, position % EXACT_BLOCK] = (request_id, position)

    def read(self, request_id: str, context: int, sinks: int, window: int) -> set[int]:
        """The positions that attention takes from the exact cache; every one checked."""
        table = torch.tensor([self.rows[request_id] + [NULL_BLOCK]], dtype=torch.int32)
        found = locate_exact(table, torch.tensor([context]), EXACT_BLOCK, sinks, window)
        positions = set()
        for slot in found.slots[found.present].tolist():
            owner, position = self.content[slot // EXACT_BLOCK, slot % EXACT_BLOCK]
            assert owner == request_id, "another request's token"
            positions.add(position)
        start, stop = found.starts.item(), found.stops.item()
        assert positions == {*range(start), *range(stop, context)}, "stale tokens"
        return positions


@dataclass
class Running:
    """A request as the test sees it.

    Attributes:
        prefill: its tokens when it was started or resumed.
        hit: of these, found in the prefix cache.
        real: tokens that the worker has computed and kept.
        scheduled: tokens of a step that the scheduler has not heard of yet.
    """

    request: Request
    prefill: int
    hit: int = 0
    real: int = 0
    scheduled: int = 0


class Schedule:
    """Random prefill chunks, decodes, drafts, hits, preemptions and aborts."""

    def __init__(
        self, sinks: int, window: int, drafts: int, lookahead: int, asynchronous: bool, blocks: int
    ):
        self.random = random.Random(f"{sinks} {window} {drafts} {asynchronous}")
        self.sinks, self.window, self.drafts = sinks, window, drafts
        self.lookahead, self.asynchronous = lookahead, asynchronous
        config: Any = SimpleNamespace(
            max_concurrent_batches=2 if asynchronous else 1,
            num_speculative_tokens=drafts,
            num_lookahead_tokens=lookahead,
        )
        margin = in_flight_tokens(config)
        heads = dict(num_kv_heads=1, head_size=8, dtype=torch.uint8, num_head_slots=1)
        self.spec = ExactWindowSpec(
            block_size=EXACT_BLOCK,
            state_content_bytes=BLOCK * 16 // EXACT_BLOCK,
            sinks=sinks,
            window=window,
            margin=margin,
            **heads,
        )
        compacted = FullAttentionSpec(block_size=BLOCK, state_content_bytes=16, **heads)
        assert compacted.page_size_bytes == self.spec.page_size_bytes
        groups = [KVCacheGroupSpec(["a"], compacted), KVCacheGroupSpec(["a.exact"], self.spec)]
        init_none_hash(sha256)
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=MAX_MODEL_LEN,
            max_in_flight_tokens=2 * MAX_MODEL_LEN,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=True,
        )
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.worker = Worker()
        self.running: dict[str, Running] = {}
        self.waiting: list[Request] = []
        self.count = 0
        self.seen: Counter[str] = Counter()
        self.themes = [[self.random.randrange(99) for _ in range(200)] for _ in range(3)]

    @property
    def pool(self):
        return self.manager.block_pool

    def add(self) -> None:
        shared = self.random.choice(self.themes)[: self.random.choice([0, 5, 48, 130])]
        own = [self.random.randrange(99) for _ in range(self.random.choice([1, 3, 20, 90]))]
        self.count += 1
        request = Request(
            str(self.count),
            shared + own,
            SamplingParams(max_tokens=200),
            None,
            block_hasher=self.hasher,
        )
        self.waiting.append(request)

    def start(self) -> None:
        request = self.waiting[0]
        computed, hit, _ = self.manager.get_computed_blocks(request)
        state = Running(request, request.num_tokens, hit=hit, real=hit)
        new = self.random.randint(1, request.num_tokens - hit)
        blocks = self.manager.allocate_slots(
            request, new, hit, computed, self.lookahead, full_sequence_must_fit=True
        )
        if blocks is None:
            self.seen["refused"] += 1
            return
        self.waiting.pop(0)
        self.seen["hits"] += hit > 0
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit
        ids = self.manager.get_block_ids(request.request_id)
        self.worker.rows[request.request_id] = list(ids[1])
        self.running[request.request_id] = state
        self.execute(state, new)

    def step(self, state: Running) -> None:
        request = state.request
        left = request.num_tokens - request.num_computed_tokens
        drafts = 0
        if left > 1:
            new = self.random.randint(1, left)
        else:
            drafts = self.random.randint(0, self.drafts)
            new = 1 + drafts
        if request.num_output_tokens > 20 or request.num_computed_tokens + new > MAX_MODEL_LEN:
            return self.end(state, "finished")
        blocks = self.manager.allocate_slots(request, new, num_lookahead_tokens=self.lookahead)
        if blocks is None:
            return self.preempt()
        self.worker.rows[request.request_id] += blocks.get_block_ids()[1]
        self.execute(state, new, drafts)

    def execute(self, state: Running, new: int, drafts: int = 0) -> None:
        request = state.request
        self.check(state)
        self.worker.write(request.request_id, state.real, state.real + new)
        rejected = self.random.randint(0, drafts)
        request.num_computed_tokens += new
        state.real += new - rejected
        if request.num_computed_tokens >= request.num_tokens:
            # The engine knows how many tokens come, not which drafts hold.
            request.append_output_token_ids([self.random.randrange(99)] * (1 + drafts - rejected))
        self.seen["rejected"] += rejected
        if self.asynchronous and rejected == 0:
            request.num_in_flight_tokens += new
            state.scheduled += new
        else:
            request.num_computed_tokens -= rejected

    def settle(self, state: Running) -> None:
        state.request.num_in_flight_tokens -= state.scheduled
        state.scheduled = 0

    def check(self, state: Running) -> None:
        """What is read is right, and nothing is missing that should be there."""
        request = state.request
        got = self.worker.read(request.request_id, state.real, self.sinks, self.window)
        if state.hit == 0:
            assert set(range(min(self.sinks, state.real))) <= got
        prompt = state.prefill
        if state.real >= prompt:
            # Where the prompt's window began, or a hit ended.
            first = max(prompt - self.window + 1, state.hit, state.real - self.window + 1)
            assert set(range(first, state.real)) <= got
            self.seen["full windows"] += first == state.real - self.window + 1 > 0

    def end(self, state: Running, why: str) -> None:
        self.seen[why] += 1
        self.settle(state)
        self.manager.free(state.request)
        del self.running[state.request.request_id]

    def preempt(self) -> None:
        state = self.random.choice(list(self.running.values()))
        self.end(state, "preempted")
        request = state.request
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def assert_sound(self) -> None:
        held: Counter[int] = Counter()
        for request_id in self.running:
            compacted, exact = self.manager.get_block_ids(request_id)
            own = [block for block in exact if block != NULL_BLOCK]
            assert len(own) <= self.spec.max_blocks_per_request
            held.update(own)
            assert all(self.pool.blocks[block].ref_cnt == 1 for block in own)
            assert all(self.pool.blocks[block].block_hash is None for block in own)
            assert not set(own) & set(compacted)
        assert not held or max(held.values()) == 1, "a block with two owners"
        compacted = {
            block
            for request_id in self.running
            for block in self.manager.get_block_ids(request_id)[0]
        }
        assert not compacted & held.keys()
        used = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        assert used == len(held) + len(compacted), "leaked blocks"


@pytest.mark.parametrize(
    ("sinks", "window", "drafts", "lookahead", "asynchronous"),
    [
        (4, 32, 0, 0, False),
        (4, 32, 3, 0, True),
        (0, 7, 2, 0, False),
        (6, 0, 0, 0, True),
        (1, 16, 7, 7, True),
    ],
)
def test_random_schedules(sinks, window, drafts, lookahead, asynchronous):
    schedule = Schedule(sinks, window, drafts, lookahead, asynchronous, blocks=160)
    choice = schedule.random
    for _ in range(STEPS):
        action = choice.random()
        if action < 0.06 and len(schedule.waiting) < 4:
            schedule.add()
        elif action < 0.15 and schedule.waiting:
            schedule.start()
        elif action < 0.157 and schedule.running:
            schedule.preempt()
        elif action < 0.165 and schedule.running:
            schedule.end(choice.choice(list(schedule.running.values())), "aborted")
        elif schedule.running:
            state = choice.choice(list(schedule.running.values()))
            schedule.settle(state)
            schedule.step(state)
        schedule.assert_sound()
    assert min(schedule.seen[k] for k in ("hits", "preempted", "aborted", "finished")) > 3
    if window > 1:
        assert schedule.seen["full windows"] > 100
    if drafts:
        assert schedule.seen["rejected"] > 50
    for state in list(schedule.running.values()):
        schedule.end(state, "finished")
    schedule.assert_sound()
    assert schedule.pool.get_num_free_blocks() == schedule.pool.num_gpu_blocks - 1


@pytest.mark.parametrize(("sinks", "window"), [(9**9, 0), (0, 9**9), (300, 300)])
def test_a_request_takes_no_more_than_its_tokens_fill(sinks, window):
    """Or vLLM refuses to start, and states too small a capacity."""
    spec = ExactWindowSpec(
        block_size=EXACT_BLOCK,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        sinks=sinks,
        window=window,
        margin=1,
    )
    model = SimpleNamespace(max_model_len=MAX_MODEL_LEN)
    blocks = MAX_MODEL_LEN // EXACT_BLOCK + 1
    wanted = spec.max_memory_usage_bytes(SimpleNamespace(model_config=model))
    assert wanted == blocks * spec.page_size_bytes
