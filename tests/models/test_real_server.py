"""A server that nobody here wrote: `transformers serve` on a base model of the family. Skipped where it cannot start.

What it does (transformers 5.23): chat and completions; it ignores `n` and `logprobs` with a warning in its own log,
refuses `top_k`, has no `/v1/models` without a cache folder, is greedy unless the model's own generation settings
sample, whatever the temperature, leaves the stop text in the text, and returns the whole conversation where it has no
parser for the model's chat template.
"""

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import httpx2
import pytest
from transformers.utils.import_utils import is_serve_available

from qinglan import cli
from qinglan.core.errors import InputError
from qinglan.core.records import Message, Prompt
from qinglan.models import generate as local
from qinglan.models import remote
from qinglan.models.language_model import load_language_model
from qinglan.models.sampling import SamplingConfig
from qinglan.models.server import RemoteConfig
from qinglan.tasks.base_models import resolve_model
from tests.conftest import CPU

NANO = Path(resolve_model("nano")).resolve()
TEXTS = ("What is an ant?", "Who lives in the hall?", "Write the word blue.", "How much is 3 plus 4?")
PROMPTS = [
    Prompt(
        id=text, source="human", producer_id="me", prompt_group_id=text, messages=(Message(role="user", content=text),)
    )
    for text in TEXTS
]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=24)
SAMPLE = json.dumps({"do_sample": True, "top_k": 0, "eos_token_id": 2, "pad_token_id": 0})


def give_up(reason: str) -> None:
    told = f"transformers serve: {reason}: the remote model is NOT tested against a real server"
    warnings.warn(told, stacklevel=2)
    pytest.skip(told)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    if not is_serve_available():
        give_up("its packages are missing, install '.[serve-test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(NANO), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=log, stderr=log
        )
        try:
            for _ in range(240):
                if process.poll() is not None:
                    give_up(f"it stopped at once: {(folder / 'log').read_text()[-300:]}")
                try:
                    httpx2.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                    break
                except httpx2.HTTPError:
                    time.sleep(0.5)
            else:
                give_up("it gave no sign of life for two minutes")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def lm():
    return load_language_model(NANO, CPU)


def texted(url, **config):
    return remote.open_remote(url, str(NANO), RemoteConfig(endpoint="completions", tokenizer=NANO, **config))


def test_greedy_completions_are_those_of_our_sampler(url, lm, capsys):
    theirs = remote.sample_completions(texted(url), PROMPTS, GREEDY, seed=0)
    ours = local.sample_completions(lm, PROMPTS, GREEDY, seed=0)
    for one, two in zip(theirs, ours, strict=True):
        assert (one[0].text, one[0].finish_reason) == (two[0].text, two[0].finish_reason)
    assert len({row[0].text for row in theirs}) > 1
    assert capsys.readouterr().err == ""  # its prompts have as many tokens as ours


def test_stop_texts_are_cut_as_ours_are(url, lm):
    full = local.sample_completions(lm, PROMPTS[:1], GREEDY, seed=0)[0][0].text
    config = GREEDY.model_copy(update={"stop": (full.split()[2],)})
    ((theirs,),) = remote.sample_completions(texted(url), PROMPTS[:1], config, seed=0)
    ((ours,),) = local.sample_completions(lm, PROMPTS[:1], config, seed=0)
    assert (theirs.text, theirs.finish_reason) == (ours.text, ours.finish_reason) and ours.finish_reason == "stop"


def test_the_chat_endpoint_answers(url, lm):
    model = remote.open_remote(url, str(NANO), RemoteConfig())
    theirs = remote.sample_completions(model, PROMPTS, GREEDY, seed=0)
    ours = local.sample_completions(lm, PROMPTS, GREEDY, seed=0)
    for one, two in zip(theirs, ours, strict=True):
        assert two[0].text in one[0].text  # as it is: with the conversation around it


def test_samples_are_asked_one_by_one_and_repeat_by_seed(url, capsys):
    model = texted(url, extra_body=json.dumps({"generation_config": SAMPLE}), max_concurrency=1)
    config = SamplingConfig(max_new_tokens=24)
    rows = remote.sample_completions(model, PROMPTS, config, seed=5, num_samples=3)
    assert "gives 1 of the 3 completions that `n` asks for" in capsys.readouterr().err
    assert all(len({one.text for one in row}) > 1 for row in rows)
    again = remote.sample_completions(model, PROMPTS[::-1], config, seed=5, num_samples=3)[::-1]
    assert [[one.text for one in row] for row in again] == [[one.text for one in row] for row in rows]
    remote.sample_completions(texted(url), PROMPTS, config, seed=5, num_samples=2)
    assert "the server seems to be greedy" in capsys.readouterr().err


def test_logprobs_that_it_does_not_give_and_a_model_that_it_does_not_serve(url):
    with pytest.raises(InputError, match="gives no log-probabilities, which are needed here"):
        remote.generate(texted(url), PROMPTS, GREEDY, seed=0, with_logprobs=True)
    with pytest.raises(InputError, match="does not send the prompt's log-probabilities back"):
        remote.score_options(texted(url), PROMPTS[:1], [["yes", "no"]])
    with pytest.raises(InputError, match=r"knows no model 'big' \(400: Server is pinned to"):
        remote.generate(remote.open_remote(url, "big", RemoteConfig()), PROMPTS, GREEDY, seed=0)


def test_the_command(url, tmp_path, capsys):
    file = tmp_path / "sampled.jsonl"
    command = ["sample", "--server", url, "--model", str(NANO), "--text", TEXTS[0], "--to", str(file), "--json"]
    more = ["--remote.endpoint", "completions", "--remote.tokenizer", str(NANO), "--sampling.temperature", "0"]
    assert cli.run([*command, *more]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["text"] and rows[1]["producer_id"] == str(NANO)
