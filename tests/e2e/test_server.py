"""A real `vllm serve` from an 8x pack, asked by the OpenAI client; and starts that must fail."""

import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.chats import (
    DIGIT,
    DIGITS,
    TEXT,
    VISUAL,
    about,
    film_question,
    image_question,
    images_in,
)
from tests.support.packs import identity_pack
from tests.support.reference import MODEL
from tests.support.server import NAME, Server
from vllm_attentionpack.config import PACK_VARIABLE
from vllm_attentionpack.packfile import Fingerprint, read_header, save_pack
from vllm_attentionpack.serving import ServerError, serve

pytestmark = pytest.mark.engine

LAYERS = 4
DENSE_BYTES_PER_TOKEN = 2048
KV_CACHE_BYTES = 16 << 20
MAX_MODEL_LEN = 2048
#: For what the server does on its own after a request ended.
PATIENCE = 30


@pytest.fixture(scope="module")
def server(calibrated: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from openai import OpenAI

    log = tmp_path_factory.mktemp("server") / "server.log"
    options = [
        *("--served-model-name", NAME, "--enforce-eager"),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--limit-mm-per-prompt", '{"image": 8, "video": 1}'),
        *("--worker-extension-cls", "tests.support.worker_extension.Inspection"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # /collective_rpc, /reset_prefix_cache
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OPENAI_API_KEY", "none")
        with serve(str(MODEL), calibrated.eightfold, log, options) as url:
            # Retries would hide a server that drops requests.
            client = OpenAI(base_url=url, max_retries=0, timeout=60)
            yield Server(url.removesuffix("/v1"), log, calibrated.eightfold, client)


@pytest.fixture(autouse=True)
def log_since(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints what the server wrote during a test; pytest shows it when the test failed."""
    if "server" not in request.fixturenames:
        yield
        return
    log = request.getfixturevalue("server").log
    start = log.stat().st_size
    yield
    print(log.read_bytes()[start:].decode(errors="replace")[-4000:])


# Starts that must fail


@pytest.fixture(scope="module")
def refused_starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The logs of servers that did not start, by what was wrong; started side by side."""
    folder = tmp_path_factory.mktemp("refused")
    other = Fingerprint(
        architecture="LlamaForCausalLM",
        num_layers=1,
        num_query_heads=4,
        num_kv_heads=2,
        head_size=64,
        rope="{}",
    )
    save_pack(identity_pack(other, ["model.layers.0.self_attn.attn"]), folder / "other")
    # The last of two flags counts.
    options = {"no pack": ["--additional-config", "{}"], "pack of another model": []}

    def start(name: str) -> str:
        log = folder / f"{name}.log"
        with (
            pytest.raises(ServerError, match="ended with exit code 1"),
            serve(str(MODEL), folder / "other", log, ["--enforce-eager", *options[name]]),
        ):
            pytest.fail("the server started")
        return log.read_text()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as threads:
        patch.delenv(PACK_VARIABLE, raising=False)
        return dict(zip(options, threads.map(start, options), strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("no pack", "ConfigError: the attention backend ATTENTIONPACK needs a pack and none is"),
        (
            "pack of another model",
            "other' was made for another model: architecture is LlamaForCausalLM in the pack and "
            "Qwen2VLForConditionalGeneration in the model.",
        ),
    ],
)
def test_a_start_that_is_refused(refused_starts, wrong, said):
    """One message, at the end, before any other process starts or weights are read."""
    log = refused_starts[wrong]
    last = log.splitlines()[-1]
    assert last.startswith("vllm_attentionpack.errors.")
    assert said in last
    assert log.count(last.partition(": ")[2]) == 1
    assert not re.search(r"EngineCore|Worker|Loading|KV cache size|Starting vLLM server", log)


# Answers


def test_the_log_says_what_is_served(server):
    header = read_header(server.pack)
    log = server.log.read_text().splitlines()
    (line,) = (line for line in log if "compacted KV cache" in line)
    (chosen,) = (line for line in log if "attention runs on the ops" in line)
    assert "AttentionPack: attention runs on the ops 'cpu'" in chosen
    tokens = KV_CACHE_BYTES // header.bytes_per_token
    found = re.search(
        r"AttentionPack: (\S+)x compacted KV cache, (\d+) -> (\d+) bytes per token, "
        r"(\d+) tokens fit \((\d+) blocks of (\d+)\)",
        line,
    )
    assert found
    assert found[1] == f"{header.compression_ratio:.2f}"
    assert float(found[1]) >= 8
    assert (int(found[2]), int(found[3])) == (DENSE_BYTES_PER_TOKEN, header.bytes_per_token)
    assert int(found[4]) == int(found[5]) * int(found[6])
    assert tokens - int(found[6]) < int(found[4]) <= tokens


def test_the_cache_really_is_that_small(server):
    """Measured in the worker, not computed from the pack."""
    cache = server.worker("measured_cache")
    (tokens,) = set(cache["tokens"].values())
    assert len(cache["tokens"]) == LAYERS
    assert cache["allocated"] <= KV_CACHE_BYTES
    assert DENSE_BYTES_PER_TOKEN * tokens / cache["allocated"] >= 8
    assert sum(cache["bytes"].values()) == cache["allocated"]


def test_questions_about_one_image(server):
    replies = [server.ask(image_question(image)) for image in DIGITS]
    read = [reply.choices[0].message.content for reply in replies]
    assert sum(map(str.__eq__, read, DIGITS.values())) >= 0.9 * len(DIGITS)
    assert {reply.choices[0].finish_reason for reply in replies} == {"stop"}
    # The digit and the end of the turn.
    assert {reply.usage.completion_tokens for reply in replies} == {2}


def test_questions_about_several_images(server):
    assert min(images_in(messages) for messages, _ in VISUAL) >= 2
    assert max(images_in(messages) for messages, _ in VISUAL) >= 6
    right = [server.answer(messages).strip() == answer for messages, answer in VISUAL]
    # Dense, 93 % of all held-out questions are answered right.
    assert sum(right) >= 0.8 * len(right)


def test_placeholder_tokens_count_as_visual(server):
    """Those of images and those of a video; the codec has a basis of their own for them."""
    assert read_header(server.pack).num_modalities == 2
    messages, _ = VISUAL[0]
    server.forget()
    server.worker("count_stored_tokens")
    usage = server.ask(messages).usage
    stored = server.worker("stored_tokens")
    # The last token of an answer is never attended to, so it is not stored.
    assert stored["tokens"] == LAYERS * (usage.prompt_tokens + usage.completion_tokens - 1)
    assert stored["visual"] == LAYERS * placeholders(messages)


def placeholders(messages: list[dict[str, Any]]) -> int:
    """The visual tokens of a chat: one for 28 x 28 pixels."""
    from io import BytesIO

    from PIL import Image

    total = 0
    for url in re.findall(r"data:image/png;base64,([^\"]+)", json.dumps(messages)):
        width, height = Image.open(BytesIO(base64.b64decode(url))).size
        total += (width // 28) * (height // 28)
    return total


def test_streamed_answers_are_the_answers(server):
    """Text, and a list long enough to come in several pieces."""
    longest = max(VISUAL, key=lambda item: len(item[1]))
    for messages, _ in (longest, TEXT[0]):
        server.forget()
        whole = server.answer(messages)
        server.forget()
        chunks = list(server.ask(messages, stream=True, stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == whole
        assert chunks[-1].usage.completion_tokens >= sum(map(bool, pieces)) > 1


def margin(reply: Any) -> float:
    """By how many nats each token of an answer was preferred at least."""
    tops = [token.top_logprobs for token in reply.choices[0].logprobs.content]
    return min(first.logprob - second.logprob for first, second in tops)


def test_eight_requests_at_once(server):
    """The answers of requests that come alone.

    Sums over a batch are rounded in another order, so only answers that rounding cannot decide are
    compared: those preferred by more than a nat.
    """
    asked, alone = [], []
    for candidates, wanted in ((VISUAL, 4), (TEXT, 8)):
        for messages, _ in candidates:
            if len(asked) == wanted:
                break
            server.forget()
            reply = server.ask(messages, logprobs=True, top_logprobs=2)
            if margin(reply) > 1.0:
                asked.append(messages)
                alone.append(reply.choices[0].message.content)
    assert len(asked) == 8
    server.forget()
    with ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(server.answer, asked))
    assert together == alone
    assert len(set(alone)) >= 6  # no answer fits all


def test_a_video(server, tmp_path):
    """A film of one image is read like the image; its placeholder tokens count as visual."""
    frames, right = 6, 0
    images = list(DIGITS)[:5]
    for image in images:
        film = tmp_path / f"{image.stem}.mp4"
        size = write_film(film, image, frames)
        server.forget()
        server.worker("count_stored_tokens")
        reply = server.ask(film_question(film))
        stored = server.worker("stored_tokens")
        right += reply.choices[0].message.content == DIGITS[image]
        # One token for 28 x 28 pixels of two frames.
        assert stored["visual"] == LAYERS * (size // 28) ** 2 * frames // 2
        new = reply.usage.prompt_tokens + reply.usage.completion_tokens - 1
        assert stored["tokens"] == LAYERS * new
    assert right >= 4


def write_film(path: Path, image: Path, frames: int) -> int:
    """Writes a film of one square image, a frame per half second; returns its size."""
    cv2 = pytest.importorskip("cv2")  # comes with vLLM
    picture = cv2.imread(str(image))
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*"mp4v"), 2, (picture.shape[1], picture.shape[0])
    )
    for _ in range(frames):
        writer.write(picture)
    writer.release()
    return picture.shape[0]


# What clients do wrong


def is_idle(server: Server) -> bool:
    return server.load() == [0.0, 0.0, 0.0]


def wait_until_idle(server: Server) -> None:
    end = time.monotonic() + PATIENCE
    while not is_idle(server):
        assert time.monotonic() < end, server.load()
        time.sleep(0.2)


def test_an_aborted_stream_gives_its_blocks_back(server):
    wait_until_idle(server)
    (before,) = server.metrics("vllm:generation_tokens_total")
    limit = MAX_MODEL_LEN - 300
    with server.ask(
        image_question(), stream=True, max_tokens=limit, extra_body={"ignore_eos": True}
    ) as stream:
        for received, _ in enumerate(stream):
            if received == 3:
                break
        # What comes back was held.
        running, _, usage = server.load()
        assert running == 1.0
        assert usage > 0.0
    wait_until_idle(server)
    (after,) = server.metrics("vllm:generation_tokens_total")
    assert 3 <= after - before < limit
    assert server.answer(image_question()) == DIGIT


@pytest.mark.parametrize(
    ("messages", "options", "status"),
    [
        pytest.param(
            about(
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                question="",
            ),
            {},
            400,
            id="broken image",
        ),
        pytest.param(
            about(
                {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
                question="",
            ),
            {},
            400,
            id="broken video",
        ),
        pytest.param(image_question() * 9, {}, 400, id="more images than allowed"),
        pytest.param([{"role": "user", "content": "a" * 3000}], {}, 400, id="too long"),
        pytest.param(image_question(), {"max_tokens": -1}, 400, id="negative length"),
        pytest.param(image_question(), {"temperature": "hot"}, 400, id="wrong type"),
        pytest.param([], {}, 400, id="no messages"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_goes_on(server, messages, options, status):
    from openai import APIStatusError

    with pytest.raises(APIStatusError) as caught:
        server.ask(messages, **options)
    assert caught.value.status_code == status
    wait_until_idle(server)
    assert server.answer(image_question()) == DIGIT
