"""`xverse benchmark`: what its report must hold, what it refuses, and peers behind our face."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny_model import published_config, vocabulary_size, write_published_folder
from xverse import cli
from xverse.engine import agree, footprint
from xverse.engine.measure import measure_throughput
from xverse.engine.simple import decode
from xverse.engine.workload import make_requests
from xverse.model.fresh import random_decoder
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.verbs import _peers
from xverse.verbs._peer_transformers import TransformersPeer, llama_of
from xverse.verbs._peers import Subject
from xverse.verbs.benchmark import Config, command_of

SMALL = ["--prompt-tokens", "6", "--new-tokens", "4", "--first-token-prompts", "5"]
SMALL += ["--concurrency", "2", "--repeat", "2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny"
    write_published_folder(path)
    return path


@pytest.fixture
def shape_folder(tmp_path: Path) -> Path:
    """A config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    return tmp_path


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "copy_bandwidth", lambda device: 1e9)


def xverse(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        code = cli.run(["benchmark", *args])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    code, out, err = xverse(capsys, *args, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_report_is_complete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    found = report(capsys, str(folder), *SMALL, "--out", str(file))
    assert json.loads(file.read_text()) == found
    assert found["command"].startswith(f"xverse benchmark {folder} --prompt-tokens 6")
    assert found["date"].endswith("+00:00")
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["machine"]["name"]
    assert found["model"]["parameters"] == ModelShape.from_config(published_config()).num_parameters
    assert found["correctness"]["sound"] is True
    assert found["correctness"]["ids"] == found["correctness"]["plain_ids"]
    assert found["engine"]["max_running"] == 64
    memory = found["memory"]
    assert memory["kv_tokens"] > 0
    assert memory["peak_bytes"] > memory["weights_bytes"] > memory["bytes_read_per_token"] > 0
    assert memory["floor_tokens_per_s"] == pytest.approx(1e9 / memory["bytes_read_per_token"], 0.01)
    (first,) = found["first_token"]
    assert (first["prompt_tokens"], first["samples"], first["who"]) == (5, 2, "xverse")
    assert 0 < first["median_s"] <= first["p95_s"]
    (alone,) = found["latency"]
    assert alone["samples"] == 2 * (4 - 1)
    assert alone["share_of_floor"] == pytest.approx(
        alone["tokens_per_s"] / memory["floor_tokens_per_s"], 0.02
    )
    assert [row["concurrency"] for row in found["load"]] == [1, 2], "one alone is always there"
    for row in found["load"]:
        assert row["requests"] == row["concurrency"]
        assert row["prompt_tokens"] == 6 * row["requests"]
        assert row["output_tokens"] == 4 * row["requests"]
        assert len(row["output_tokens_per_s_all"]) == 2
        assert row["total_tokens_per_s"] == pytest.approx(2.5 * row["output_tokens_per_s"], 0.01)
        assert row["ttft_median_s"] <= row["ttft_p95_s"]
        assert (row["preempted"], row["reused_tokens"]) == (0, 0)
        assert row["xverse_is_times_as_fast"] == 1.0


def test_tables_name_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = xverse(capsys, str(folder), *SMALL, "--new-tokens", "1")
    assert code == 0
    for words in (
        "XVERSE-Tiny, bfloat16",
        "all 16 greedy ids equal those of the plain decoder",
        "Time to first token",
        "room for",
        "hence the floor",
    ):
        assert words in out
    assert "float32" not in out


def test_uniform_lengths_and_sampling(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--prompt-tokens", "3-9", "--new-tokens", "2-5", "--first-token-prompts", "3"]
    options = ["--workload", "uniform", "--concurrency", "3", "--repeat", "1"]
    found = report(capsys, str(folder), *lengths, *options, "--temperature", "0.8")
    (alone, three) = found["load"]
    assert (alone["requests"], three["requests"]) == (4, 12)
    expected = make_requests(12, (3, 9), (2, 5), vocabulary=vocabulary_size())
    assert three["prompt_tokens"] == sum(len(request.ids) for request in expected)
    assert 12 * 2 <= three["output_tokens"] <= 12 * 5
    assert found["workload"]["temperature"] == 0.8


@pytest.mark.parametrize("moe", [False, True])
def test_random_weights_of_a_config(
    moe: bool, shape_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shape_folder / "config.json").write_text(json.dumps(published_config(moe=moe)))
    found = report(capsys, str(shape_folder), "--random-weights", *SMALL, "--dtype", "float32")
    assert found["model"]["random_weights"] is True
    assert found["model"]["dtype"] == "float32"
    assert found["load"][1]["output_tokens"] == 8
    code, _, err = xverse(capsys, str(shape_folder), *SMALL)
    assert code == 1, "without the flag there are no weights"
    assert "error:" in err


def test_quantized_weights_are_smaller(
    shape_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [str(shape_folder), "--random-weights", *SMALL, "--repeat", "1"]
    plain, rounded = report(capsys, *ask), report(capsys, *ask, "--quantize", "4")
    sizes = [one["memory"]["bytes_read_per_token"] for one in (plain, rounded)]
    assert sizes[1] < 0.7 * sizes[0]


def test_transformers_answers_the_same_ids_in_the_same_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = ["--peer", "transformers", "--dtype", "float32"]
    found = report(capsys, str(folder), *SMALL, *peer)
    assert found["peers"]["transformers"]["equal_ids"] == 16
    for table in ("first_token", "latency", "load"):
        assert {row["who"] for row in found[table]} == {"xverse", "transformers"}
    ours, theirs = found["load"][2:]
    assert theirs["output_tokens"] == ours["output_tokens"] == 8
    assert theirs["preempted"] is None
    speeds = ours["output_tokens_per_s"] / theirs["output_tokens_per_s"]
    assert theirs["xverse_is_times_as_fast"] == pytest.approx(speeds, 0.01)
    code, out, _ = xverse(capsys, str(folder), *SMALL, *peer, "--repeat", "1")
    assert code == 0
    assert "transformers" in out


LLAMA = published_config() | {"model_type": "llama"}


@pytest.mark.parametrize(
    "config",
    [
        published_config(),
        LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        LLAMA | {"attention_bias": True, "mlp_bias": True},
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_transformers_has_our_weights_and_pads_on_the_left(config: dict[str, object]) -> None:
    shape = ModelShape.from_config(config)
    decoder = fuse(random_decoder(shape, dtype=torch.float32, device=CPU, std=0.15))
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.3)
    peer = TransformersPeer(llama_of(shape, decoder))
    shared = peer.model.model.layers[0].self_attn.k_proj.weight
    assert shared.untyped_storage().data_ptr() == (
        decoder.model.layers[0].self_attn.qkv_proj.weight.untyped_storage().data_ptr()
    )
    requests = make_requests(5, (2, 14), (1, 9), vocabulary=shape.vocab_size)
    run = measure_throughput(peer, requests, concurrency=3)
    for request, answer in zip(requests, run.answers, strict=True):
        assert request.sampling is not None
        plain = decode(decoder, [request.ids], [request.sampling])
        assert answer.ids == tuple(token.id for token in plain)


def test_what_breaks_in_a_peer_s_thread_is_raised() -> None:
    shape = ModelShape.from_config(published_config())
    decoder = random_decoder(shape, dtype=torch.float32, device=CPU)
    peer = TransformersPeer(llama_of(shape, decoder))
    requests = make_requests(1, (3, 3), (2, 2), vocabulary=10**6)  # ids that it does not know
    with pytest.raises(IndexError):
        measure_throughput(peer, requests)


@pytest.mark.parametrize("peer", ["transformers", "vllm", "llama.cpp"])
def test_a_peer_that_is_missing_is_named_before_anything_is_loaded(
    peer: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_peers, "find_spec", lambda name: None)
    monkeypatch.setattr("xverse.verbs.benchmark.open_engine", None)
    code, _, err = xverse(capsys, str(folder), *SMALL, "--peer", peer)
    assert code == 1
    assert f"The peer {peer} is not installed" in err
    assert "pip install" in err


@pytest.mark.parametrize(
    ("peer", "options", "why"),
    [
        ("llama.cpp", [], "GGUF files only"),
        ("transformers", ["--quantize", "4"], "other weights"),
        ("vllm", ["--quantize", "8"], "other weights"),
        ("transformers", ["--kv-dtype", "fp8"], "dtype of the weights"),
        ("vllm", [], "safetensors only"),
    ],
)
def test_peers_that_would_compute_something_else_are_refused(
    peer: str,
    options: list[str],
    why: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_peers, "find_spec", lambda name: object())
    code, _, err = xverse(capsys, str(folder), *SMALL, "--peer", peer, *options)
    assert code == 1
    assert why in err


def test_no_peer_computes_the_mixture_of_experts(
    shape_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shape_folder / "config.json").write_text(json.dumps(published_config(moe=True)))
    ask = [str(shape_folder), "--random-weights", "--peer", "transformers"]
    code, _, err = xverse(capsys, *ask, *SMALL)
    assert code == 1
    assert "mixture of experts" in err


def test_wrong_answers_are_loud_and_not_timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = agree.measure_latency

    def lying(*args: Any) -> Any:
        run = honest(*args)
        (answer,) = run.answers
        wrong = SimpleNamespace(ids=tuple((id + 1) % 300 for id in answer.ids))
        return SimpleNamespace(answers=(wrong,))

    monkeypatch.setattr(agree, "measure_latency", lying)
    code, out, _ = xverse(capsys, str(folder), *SMALL)
    assert code == 1
    assert "WRONG ANSWERS" in out
    assert "Time to first token" not in out
    code, out, _ = xverse(capsys, str(folder), *SMALL, "--json")
    assert code == 1
    found = json.loads(out)
    assert found["correctness"]["sound"] is False
    assert found["load"] == found["latency"] == found["first_token"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "xverse-7b"], "has no weights"),
        (["--shape", "xverse-7c", "--random-weights"], "Did you mean 'xverse-7b'"),
        (["MODEL", "--shape", "xverse-7b", "--random-weights"], "two things"),
        (["MODEL", "--concurrency", "1,x"], "1,8,64"),
        (["MODEL", "--concurrency", "0"], "--concurrency"),
        (["MODEL", "--prompt-tokens", "3-9"], "one length"),
        (["MODEL", "--workload", "uniform", "--new-tokens", "9"], "a range"),
        (["MODEL", "--workload", "uniform", "--new-tokens", "9-3"], "a range"),
        (["MODEL", "--prompt-tokens", "200", "--new-tokens", "57"], "longer than the model's"),
        (["MODEL", "--first-token-prompts", "256"], "longer than the model's"),
        (["MODEL", "--requests", "0"], "--requests"),
        (["MODEL", "--repeat", "0"], "--repeat"),
        (["MODEL", "--kv-tokens", "1"], "does not fit in memory"),
        (["MODEL", "--tensor-parallel", "0"], "--tensor-parallel"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = xverse(capsys, *(str(folder) if o == "MODEL" else o for o in options))
    assert code == 1
    assert words in err


def test_lengths_by_default_are_within_the_context(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [str(folder), "--prompt-tokens", "4", "--new-tokens", "2", "--concurrency", "1"]
    found = report(capsys, *ask, "--repeat", "1")
    assert [row["prompt_tokens"] for row in found["first_token"]] == [128]


def test_the_command_asks_for_the_same_again() -> None:
    config = Config(model="a b", json=True, peer=("vllm", "transformers"), kv_tokens=9)
    words = "xverse benchmark 'a b' --kv-tokens 9 --peer vllm --peer transformers --json"
    assert command_of(config) == words


class FakeLlama:
    """llama-cpp-python's class, as far as it is used: counts on from the last id."""

    def __init__(self, path: str, **options: object) -> None:
        self.fresh, self.closed = False, False
        assert options["n_ctx"] == 99

    def reset(self) -> None:
        self.fresh = True

    def close(self) -> None:
        self.closed = True

    def generate(self, ids: Sequence[int], **options: object) -> Iterator[int]:
        assert self.fresh, "or the last prompt's keys would be used"
        assert options["temp"] == 0.0
        self.fresh, last = False, ids[-1]
        while True:
            last += 1
            yield last


def subject(**others: Any) -> Subject:
    shape = ModelShape.from_config(published_config())
    facts: dict[str, Any] = {"random_weights": True, "quantized": False, "kv_dtype": "auto"}
    facts |= {"most_running": 3, "longest": 99} | others
    return Subject("tiny", Path("tiny.gguf"), shape, CPU, **facts)


def test_llama_cpp_answers_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("llama_cpp")
    module.Llama = FakeLlama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.delitem(sys.modules, "xverse.verbs._peer_llama_cpp", raising=False)
    monkeypatch.setattr(_peers, "find_spec", lambda name: object())
    shape = ModelShape.from_config(published_config())
    decoder = random_decoder(shape, dtype=torch.float32, device=CPU)
    peer = _peers.open_peer("llama.cpp", subject(random_weights=False), decoder)
    requests = make_requests(3, (2, 5), (1, 4), vocabulary=50)
    run = measure_throughput(peer, requests, concurrency=2)
    for request, answer in zip(requests, run.answers, strict=True):
        start = request.ids[-1] + 1
        assert answer.ids == tuple(range(start, start + len(answer.ids)))
    assert not peer.same_weights
    peer.close()


class FakeVllm:
    """vLLM's offline class, as far as it is used: two tokens a step for every request."""

    def __init__(self, model: str, **options: object) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        assert (config["model_type"], config["torch_dtype"]) == ("llama", "float32")
        assert (options["load_format"], options["enable_prefix_caching"]) == ("dummy", False)
        self.llm_engine = self
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.open: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert params.ignore_eos
        self.open[name] = [prompt["prompt_token_ids"][-1], params.max_tokens]

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for name, state in list(self.open.items()):
            count = min(2, state[1])
            ids = [state[0] + i + 1 for i in range(count)]
            state[:] = [ids[-1], state[1] - count]
            done = state[1] == 0
            if done:
                del self.open[name]
            answer = SimpleNamespace(token_ids=ids)
            outputs.append(SimpleNamespace(request_id=name, outputs=[answer], finished=done))
        return outputs


def test_vllm_steps_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    module, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams = FakeVllm, SimpleNamespace  # type: ignore[attr-defined]
    params.RequestOutputKind = SimpleNamespace(DELTA=1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setattr(_peers, "find_spec", lambda name: object())
    shape = ModelShape.from_config(published_config())
    decoder = random_decoder(shape, dtype=torch.float32, device=CPU)
    peer = _peers.open_peer("vllm", subject(), decoder)
    run = measure_throughput(peer, make_requests(4, (2, 5), (1, 6), vocabulary=50), concurrency=3)
    assert all(
        answer.ids == tuple(range(answer.ids[0], answer.ids[0] + len(answer.ids)))
        for answer in run.answers
    )
    assert not peer.same_weights, "its weights are random, too, but others"
    peer.close()
