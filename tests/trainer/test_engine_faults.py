"""An engine that fails while the trainer works costs a run time: the next version is served by the engine started anew.

The server here is a process that speaks as much of vLLM's interface as a run uses; it draws letters.
"""

import asyncio
import json
import os
import signal

import psutil
import pytest
import toy
from espalier.rollouts.samplers.base import SamplerError
from espalier.rollouts.samplers.torch import TorchSampler
from espalier.trainer.background import Background
from espalier.trainer.errors import UserError
from espalier.trainer.loop import train
from espalier.trainer.rounds import SyncSource
from tokenizers import Tokenizer

SERVER = """
import json, math, os, random, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LETTERS = json.loads(os.environ["FAKE_LETTERS"])
MODELS = {sys.argv[sys.argv.index("--model") + 1]}


class Handler(BaseHTTPRequestHandler):
    def answer(self, value, status=200):
        said = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_GET(self):
        self.answer({"data": [{"id": min(MODELS, key=len), "max_model_len": 4096}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            MODELS.add(asked["lora_name"])
            return self.answer({})
        if asked.get("model") not in MODELS:
            return self.answer({}, 404)
        tokens = [random.choice(LETTERS), *asked.get("stop_token_ids", [])[:1]][: asked["max_tokens"]]
        logprobs = [0.0 if asked.get("top_k") == 1 else -math.log(len(LETTERS)), 0.0][: len(tokens)]
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}
        self.answer({"choices": [choice], "usage": {}})

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(toy_base, tmp_path, monkeypatch):
    """What the command line of vLLM's server starts."""
    home = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    home.mkdir(parents=True)
    for folder in (home, home.parent, home.parent.parent):
        (folder / "__init__.py").touch()
    (home / "api_server.py").write_text(SERVER)
    tokenizer = Tokenizer.from_file(str(toy_base / "tokenizer.json"))
    monkeypatch.setenv("FAKE_LETTERS", json.dumps([tokenizer.token_to_id(letter) for letter in toy.LETTERS]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setattr("espalier.trainer.sampling.find_spec", lambda _: True)  # only the server has to find it
    monkeypatch.setattr("espalier.rollouts.samplers.vllm_server.SUSPECT_SECONDS", 0.5)
    monkeypatch.setattr("espalier.rollouts.samplers.vllm_process.PROBE_SECONDS", 1.0)


def rows(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def two_steps(base, out, **changes):
    settings = {"trainer": {"steps": 2}, "eval": {"tasks": 2, "every": 0, "greedy": False}, **changes}
    return toy.run_config(base, out, alarms={"max_logprob_gap": 100.0}, **settings)


def source_that(fault):
    """Batches as ever; `fault` happens once those of the first step are sampled."""

    class Source(SyncSource):
        def next(self, step):
            batch = super().next(step)
            if step == 1:
                fault()
            return batch

    return Source


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_while_the_trainer_works_costs_no_run(toy_base, tmp_path, fake_vllm, fault):
    hit = []

    def strike():
        for process in psutil.Process().children(recursive=True):
            if "vllm.entrypoints.openai.api_server" in process.cmdline():
                hit.append(process)
                os.kill(process.pid, fault)

    config = two_steps(toy_base, tmp_path, sampler={"kind": "vllm-server", "slots": 8})
    result = train(config, make_source=source_that(strike))
    assert len(hit) == 1 and not hit[0].is_running(), "the fault was met"
    assert (result["steps"], result["version"]) == (2, 2)
    assert [row["sampled_by"] for row in rows(tmp_path / "toy", "train")] == [0, 1]


class Restarting(TorchSampler):
    """Refuses versions as an engine does that died unnoticed, and is started again."""

    refusals = ()

    async def publish(self, version):
        if version.number and self.refusals:
            raise self.refusals.pop()
        await super().publish(version)


@pytest.fixture
def refusing(toy_base, monkeypatch):
    """Makes the run's sampler refuse so often."""

    def refuse(*errors):
        sampler = Restarting(toy_base, slots=8, threads=1, max_tokens=440)
        sampler.refusals = list(errors)
        monkeypatch.setattr("espalier.trainer.rollout_side.make_sampler", lambda *_: sampler)
        return sampler

    return refuse


def test_an_engine_that_is_started_again_is_waited_for(toy_base, tmp_path, refusing):
    sampler = refusing(*(SamplerError("vLLM died while version 1 was loaded.", retryable=True) for _ in range(3)))
    result = train(two_steps(toy_base, tmp_path))
    assert not sampler.refusals, "the fault was met"
    assert (result["steps"], result["version"]) == (2, 2)


def test_an_engine_that_is_given_up_ends_the_run_in_one_sentence(toy_base, tmp_path, refusing, monkeypatch):
    refusing(SamplerError("vLLM failed 6 times in 30 minutes."))
    with pytest.raises(UserError, match="failed 6 times"):
        train(two_steps(toy_base, tmp_path / "gone"))
    monkeypatch.setattr("espalier.trainer.rollout_side.RESTART_SECONDS", 0.0)
    refusing(*(SamplerError("vLLM did not serve version 1 within 300 s.", retryable=True) for _ in range(9)))
    with pytest.raises(UserError, match="did not serve version 1"):
        train(two_steps(toy_base, tmp_path / "late"))


async def never():
    await asyncio.Event().wait()


def test_what_takes_too_long_is_one_sentence():
    loop = Background("test")
    with pytest.raises(UserError, match=r"did not finish within 0 s.*--resume") as met:
        loop.call(never(), 0.05)
    assert isinstance(met.value, TimeoutError)
    loop.close()
