"""Without a network a Hub data set comes from the cache, or one line says at once what to do."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from a3cli.settings import TextSettings
from a3cli.text import reach
from a3cli.text.documents import load_hub_dataset, working_offline
from tests.conftest import SHORT, refused


@pytest.fixture
def online(monkeypatch) -> None:
    """Nothing says that there is no network, and there is no proxy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def closed_port(online, monkeypatch) -> Iterator[str]:
    """An endpoint on this machine that refuses connections: its port is bound, and nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        yield endpoint


@pytest.fixture
def cached(tmp_path, monkeypatch) -> list[str]:
    """The texts of `owner/name`, as a `load_dataset` without streaming has left them in the cache."""
    from datasets import Dataset, DatasetInfo
    from datasets.arrow_writer import ArrowWriter
    from datasets.splits import SplitDict, SplitInfo

    texts = ["first", "second"]
    folder = tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    features = Dataset.from_dict({"text": texts}).features
    with ArrowWriter(path=str(folder / "name-train.arrow"), features=features) as writer:
        for text in texts:
            writer.write({"text": text})
        writer.finalize()
    splits = SplitDict(dataset_name="name")
    splits.add(SplitInfo("train", num_bytes=1, num_examples=2, dataset_name="name"))
    info = DatasetInfo(
        features=features, builder_name="text", dataset_name="name", config_name="default", splits=splits
    )
    info.write_to_directory(str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return texts


def read(dataset: str = "owner/name") -> list[str]:
    settings = TextSettings(dataset=dataset, seq_len=8)
    return [row["text"] for row in load_hub_dataset(settings, purpose="calibrate")]


def test_one_line_in_a_second(a3, checkpoint, closed_port, tmp_path):
    source = checkpoint("llama-gqa")
    command = ("calibrate", source, "--dataset", "owner/name", *SHORT, "--work", tmp_path / "work")
    a3("plan", source)  # imports
    started = time.monotonic()
    refused(a3(*command), "owner/name", f"{closed_port} could not be reached", "refused", "give --dataset FILE")
    refused(a3("eval", source, *SHORT), "wikitext2", closed_port, "not in the cache; give --dataset FILE")
    assert time.monotonic() - started < 8  # the libraries alone take 29 s for each
    assert not (tmp_path / "work").exists()


def test_offline_by_the_environment(a3, checkpoint):
    refused(a3("eval", checkpoint("llama-gqa"), *SHORT), "wikitext2: HF_HUB_OFFLINE=1", "give --dataset FILE")


def test_the_cache_is_used_without_a_network(cached, closed_port):
    from datasets import config
    from huggingface_hub import constants

    assert read() == cached
    assert not config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_the_cache_is_used_offline(cached):
    assert read() == cached
    with working_offline():
        assert read() == cached


def test_another_configuration_in_the_cache_is_named(a3, checkpoint, cached):
    command = ("eval", checkpoint("llama-gqa"), "--dataset", "owner/name:other", "--split", "train", *SHORT)
    refused(a3(*command), "owner/name:other", "not in the cache", "'other'", "give --dataset FILE")


def test_a_host_that_listens_may_be_the_hub(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert reach.unreachable() is None


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_nothing_is_sure_behind_a_proxy(name, closed_port, monkeypatch):
    monkeypatch.setenv(name, "http://proxy.example:3128")
    monkeypatch.setattr(socket, "create_connection", pytest.fail)
    assert reach.unreachable() is None


def test_a_name_that_does_not_resolve(online, monkeypatch):
    def resolve(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert reach.unreachable() == "https://hub.example could not be reached (Name or service not known)"


def test_a_resolver_that_does_not_answer(online, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(10) and [])
    monkeypatch.setattr(reach, "PATIENCE", 0.1)
    try:
        assert reach.unreachable() == "https://hub.example could not be reached (no answer in 0.1 s)"
    finally:
        done.set()
