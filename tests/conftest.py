"""Fixtures and collection rules shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from examples import examples
from plain_cpu import without_bfloat16

# A shell that runs the tests in the background makes them ignore SIGINT, which some tests send.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machine may be busy: a slow example is not a failure, and pytest-timeout catches hanging tests.
# The same examples in every run, so that a change is judged by what it changed; the profile "random" draws others.
settings.register_profile("d2llm", deadline=None, derandomize=True, max_examples=examples(100))
settings.register_profile("random", deadline=None, max_examples=examples(100))
settings.load_profile("d2llm")

if os.environ.get("D2LLM_TEST_NETWORK") != "1":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing model fails at once, not after retries

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

REPOSITORY = Path(__file__).parents[1]


# Tests whose results depend on the CPU's instruction set; `make test-avx2` runs them restricted to AVX2.
NUMERIC_FOLDERS = ("golden", "parity", "property")
NUMERIC_FILES = (
    *("doctor/doctor", "ops/calibration", "ops/fusion", "ops/losses", "ops/ranking", "training/gradient_cache"),
    *("models/backbone", "models/cosine_head", "models/device", "models/interaction", "models/late_chunking"),
    *("models/lora", "models/pooling", "models/scorer", "models/student"),
    *("models/teachers/causal", "models/teachers/shared_prefix"),
    *("store/ann", "store/scan", "store/vector_file", "store/vector_formats", "store/view"),
)

# Left out by `make test-fast`, with what `make test` leaves out: folders that start programs, servers and browsers, and
# slow files. Single tests are marked where they are.
SLOW_FOLDERS = ("campaign", "e2e")
SLOW_FILES = (
    *("cli/verbs", "data/labels", "evaluation/evaluate", "models/engines/lean", "models/export/sentence_transformers"),
    *("models/external", "models/idle_parts", "models/remote/endpoint", "models/remote/pace"),
    *("models/teachers/causal", "models/teachers/shared_prefix", "property/ann", "property/batches"),
    *("property/engines", "property/exact_search", "property/index_search", "property/store_state"),
    *(
        "repository/additions",
        "repository/examples",
        "repository/site",
        "retrieval/chunking",
        "retrieval/shard",
        "retrieval/sync",
    ),
    *("retrieval/tasks", "server/http_protocol", "server/slow_clients", "store/ann", "store/index_spec"),
    *("store/part_vectors", "store/remote_shards", "training/fit_tokens", "training/idle_parts", "training/residual"),
)

# Left out by `make test`, which has ten minutes, and run by `make test-all`: what a change of the core seldom breaks
# (methods of others, comparisons with other libraries and other ways, clusters, browsers), and the longest files.
REST_FOLDERS = ("benchmarks", "demo", "dialects", "golden", "integrations", "methods", "parity", "runners")
CORE_E2E = ("architectures", "distill", "run", "server")
"""Files of e2e that `make test` runs, besides those of the command line (cli_*)."""
REST_FILES = (
    *("cli/streams", "data/parser_workers", "data/table_files", "e2e/cli_documents", "e2e/cli_filter"),
    *("evaluation/evaluate_again", "evaluation/shortcuts", "evaluation/word_rows", "fitting/fit"),
    *("ops/token_bounds", "property/sharded_search", "repository/one_as_list"),
    *("server/fairness", "server/large_bodies", "server/running", "server/stopping", "server/uploads"),
    *("sizing/index_bytes", "training/pretrain", "training/tune_stopping"),
)

# These start first, in this order: those of Ray because they wait for each other's processes, and because all of them
# are then in one test process and share a cluster; the longest, so that at the end no process waits for one of them.
FIRST_FILES = (
    *("cluster", "server_ray", "ray_runner", "ray_verbs", "steps"),
    *("training_memory", "index_damage", "campaign", "distill_processes", "plain_sentence_transformers"),
)


def file_of(name: str) -> Path:
    """The test file of a name like ``store/ann``."""
    folder, _, module = name.rpartition("/")
    return Path(__file__).parent / folder / f"test_{module}.py"


@cache  # there are thousands of tests, in a few hundred files
def _is_among(path: Path, folders: tuple[str, ...], files: tuple[str, ...]) -> bool:
    within = path.relative_to(Path(__file__).parent).parts[:-1]
    return not set(within).isdisjoint(folders) or path in map(file_of, files)


def _is_rest(path: Path) -> bool:
    name = path.stem.removeprefix("test_")
    is_core = path.parent.name != "e2e" or name in CORE_E2E or name.split("_")[0] == "cli"
    return not is_core or _is_among(path, REST_FOLDERS, REST_FILES)


def _is_slow(path: Path) -> bool:
    return _is_rest(path) or _is_among(path, SLOW_FOLDERS, SLOW_FILES)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import the files that ``-m "not slow"`` or ``-m "not rest"`` leaves out: their libraries load slowly."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    match config.getoption("markexpr"):
        case "not slow":
            leaves_out = _is_slow(collection_path)
        case "not rest":
            leaves_out = _is_rest(collection_path)
        case _:
            leaves_out = False
    return True if leaves_out else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without the garbage collector, let it pass over what was imported, and let it run more seldom.

    Imports create millions of objects, hardly any of which become garbage: looking at them took a quarter of this time.
    In the tests of the server, where it ran as often as by default, it took another twelfth.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": index for index, name in enumerate(FIRST_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if _is_among(item.path, NUMERIC_FOLDERS, NUMERIC_FILES):
            item.add_marker(pytest.mark.numeric)
        if _is_rest(item.path):
            item.add_marker(pytest.mark.rest)
        if _is_slow(item.path) or item.get_closest_marker("rest"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("network") and os.environ.get("D2LLM_TEST_NETWORK") != "1":
            item.add_marker(pytest.mark.skip(reason="needs the network: set D2LLM_TEST_NETWORK=1"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def cluster() -> Generator[Any]:
    """A Ray cluster of two nodes with a core each on this machine, to which this process is connected."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
    from tiny_cluster import tiny_cluster

    with tiny_cluster() as made:
        yield made


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, which tests leave as it is."""
    from tiny_models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder, which tests leave as it is."""
    from tiny_models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What distillations need: a model, a data set and the labels of a teacher."""
    from tiny_distill import Workspace

    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets in BEIR layout, in ``shared/data`` next to the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}, which does not exist")
    return folder


@pytest.fixture(params=["this-cpu", "plain-cpu"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test twice: with all features of this CPU, and as if it had no fast or fused bfloat16 products."""
    if request.param == "plain-cpu":
        without_bfloat16(monkeypatch)
    return request.param
