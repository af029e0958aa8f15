"""The sampler's verbs over a server: what is asked, what is believed, and one clear line for everything that fails."""

import asyncio
import importlib
import json
import math
import multiprocessing
import ssl
import threading
import time
from contextlib import ExitStack
from email.utils import formatdate
from functools import partial

import httpx2
import pytest

from qinglan import cli
from qinglan.core.errors import InputError
from qinglan.core.records import Message, Prompt
from qinglan.models import remote
from qinglan.models.language_model import save_language_model
from qinglan.models.sampling import SamplingConfig
from qinglan.models.server import Journal, RemoteConfig, base_address, retry_after
from tests.models.fake_server import Reply, completion, logprob_of, serving, well_behaved, words_of

CONFIG = SamplingConfig(max_new_tokens=32)
CERTIFICATES = ssl.create_default_context()
QUICK = {"retry_delay": 0.001, "max_retries": 3}


@pytest.fixture(autouse=True)
def certificates_read_once(monkeypatch):
    """Reading them takes longer than anything else here, and each client would do it."""
    client = partial(httpx2.AsyncClient, verify=CERTIFICATES)
    monkeypatch.setattr("qinglan.models.server.httpx2.AsyncClient", client)


def prompts(*texts):
    return [
        Prompt(
            id=f"prompt-{text}",
            source="human",
            producer_id="me",
            prompt_group_id=text,
            split="test",
            messages=(Message(role="user", content=text),),
        )
        for text in texts
    ]


def ask(server, texts=("ant",), num_samples=1, sampling=CONFIG, model="tiny", with_logprobs=False, **config):
    model = remote.open_remote(server.url, model, RemoteConfig(**{**QUICK, **config}))
    return remote.generate(
        model, prompts(*texts), sampling, seed=3, num_samples=num_samples, with_logprobs=with_logprobs
    )


def refused(server, *args, **config):
    with pytest.raises(InputError) as error:
        ask(server, *args, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_completions_are_records_with_their_sampler(endpoint):
    with serving(well_behaved) as server:
        model = remote.open_remote(f"{server.url}/v1/", "tiny", RemoteConfig(endpoint=endpoint))
        sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=9, stop=("\n\n",))
        rows = remote.sample_completions(model, prompts("ant", "bee"), sampling, seed=3, num_samples=2)
    path, body = server.requests[0]
    expected = {
        "model": "tiny",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 9,
        "stop": ["\n\n"],
        "n": 2,
    }
    assert expected.items() <= body.items() and 0 <= body["seed"] < 2**31 and "logprobs" not in body
    if endpoint == "chat":
        assert (path, body["messages"]) == ("/v1/chat/completions", [{"role": "user", "content": "ant"}])
    else:
        assert (path, body["prompt"]) == ("/v1/completions", "User: ant\n\nAssistant:")
    assert len(server.requests) == 2
    records = [record for row in rows for record in row]
    assert len({record.id for record in records}) == 4
    first = records[0]
    assert (first.source, first.producer_id, first.prompt_id, first.split) == ("policy", "tiny", "prompt-ant", "test")
    assert first.sampler.model_dump() == {"policy": "tiny", "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3}
    assert first.token_ids is None and first.finish_reason == "stop"


def test_default_settings_send_no_field_that_servers_may_not_know():
    with serving(well_behaved) as server:
        ask(server)
    assert set(server.requests[0][1]) == {"model", "messages", "temperature", "max_tokens", "seed"}


def test_extra_fields_are_added_and_null_removes_one():
    with serving(well_behaved) as server:
        ask(server, extra_body='{"seed": null, "min_p": 0.1}')
        assert "expected a JSON object" in refused(server, extra_body="[1]")
        assert "--remote.extra-body: is not JSON" in refused(server, extra_body="{")
    assert set(server.requests[0][1]) == {"model", "messages", "temperature", "max_tokens", "min_p"}


def test_completions_depend_on_seed_and_prompt_and_on_nothing_else():
    with serving(well_behaved) as server:
        one = ask(server, ["ant", "bee", "cat"], 2)
        assert ask(server, ["cat", "ant", "bee"], 2, max_concurrency=1) == [one[2], one[0], one[1]]
    texts = [sample.text for row in one for sample in row]
    assert len(set(texts)) == 6


def test_a_template_of_a_tokenizer_writes_the_text(tiny_lm, tmp_path, capsys):
    lm = tiny_lm()
    save_language_model(lm, tmp_path / "model")
    with serving(well_behaved) as server:
        ask(server, endpoint="completions", tokenizer=tmp_path / "model")
        assert server.requests[0][1]["prompt"] == "<|im_start|>user\nant<|im_end|>\n<|im_start|>assistant\n"
        assert "reads a prompt of 20 tokens as 20" not in capsys.readouterr().err
        assert "--remote.endpoint completions" in refused(server, tokenizer=tmp_path / "model")


def test_the_key_comes_from_the_environment(monkeypatch):
    with serving(well_behaved) as server:
        ask(server)
        monkeypatch.setenv("MY_KEY", "s3cret")
        ask(server, api_key_variable="MY_KEY")
    keys = [{name.lower(): value for name, value in sent.items()}.get("authorization") for sent in server.headers]
    assert keys == [None, "Bearer s3cret"]


def test_concurrency_is_bounded_and_the_first_request_goes_alone():
    three = threading.Barrier(3)  # nobody goes on before three are there

    def slow(path, body, seen):
        if seen > 0:
            three.wait(timeout=20)
        return well_behaved(path, body, seen)

    with serving(slow) as server:
        assert len(ask(server, [f"w{number}" for number in range(10)], max_concurrency=3)) == 10
    assert server.most_at_once == 3 and three.broken is False


@pytest.mark.parametrize("kind", ["ignores", "refuses"])
def test_a_server_that_knows_no_n_is_asked_one_by_one(kind, capsys):
    def single(path, body, seen):
        if kind == "refuses" and "n" in body:
            return Reply({"detail": "Unexpected fields in the request: {'n'}"}, 422)
        return well_behaved(path, body | {"n": 1}, seen)

    with serving(single) as server:
        rows = ask(server, ["ant", "bee"], 3)
    assert [len({sample.text for sample in row}) for row in rows] == [3, 3]
    assert ["n" in body for _, body in server.requests].count(True) == 1  # it is asked once and not again
    assert len(server.requests) == (6 if kind == "ignores" else 7)
    given = 1 if kind == "ignores" else 0
    assert capsys.readouterr().err.count(f"gives {given} of the 3 completions that `n` asks for") == 1


def test_it_works_inside_a_running_event_loop():
    async def notebook():
        return ask(server)

    with serving(well_behaved) as server:
        assert len(asyncio.run(notebook())[0]) == 1


# --------------------------------------------------------------------------------------------------- why a text ended


@pytest.mark.parametrize(
    ("changes", "stop", "reason", "text"),
    [
        ({"finish_reason": "stop"}, (), "eos", "one two"),
        ({"finish_reason": "length"}, (), "length", "one two"),
        ({"finish_reason": "length"}, ("zzz",), "length", "one two"),
        ({"finish_reason": "stop"}, ("zzz",), "stop", "one two"),  # the server does not say which
        ({"finish_reason": "stop", "stop_reason": None}, ("zzz",), "eos", "one two"),
        ({"finish_reason": "stop", "stop_reason": "zzz"}, ("zzz",), "stop", "one two"),
        ({"finish_reason": "stop"}, ("two",), "stop", "one"),  # left in the text: cut as our sampler cuts it
        ({"finish_reason": "length"}, ("two",), "stop", "one"),  # not obeyed at all
        ({"finish_reason": "content_filter"}, (), None, "one two"),
    ],
)
def test_finish_reasons(changes, stop, reason, text, capsys):
    answer = lambda path, body, seen: Reply({"choices": [completion(" one two ", path, body, **changes)]})  # noqa: E731
    with serving(answer) as server:
        ((sample,),) = ask(server, sampling=SamplingConfig(stop=stop))
    assert (sample.finish_reason, sample.text) == (reason, text)
    assert ("1 completions ended for a reason of its own" in capsys.readouterr().err) == (reason is None)


def test_an_empty_completion_is_a_completion():
    for content in ("", None):
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        with serving(lambda *_, choice=choice: Reply({"choices": [choice]})) as server:
            ((sample,),) = ask(server)
        assert (sample.text, sample.finish_reason) == ("", "eos")


# ---------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_logprobs_of_every_token(endpoint):
    with serving(well_behaved) as server:
        for row in ask(server, ["ant", "bee"], 2, with_logprobs=True, endpoint=endpoint):
            for sample in row:
                assert sample.logprobs == [logprob_of(token) for token in words_of(sample.text)]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_logprobs_that_are_missing_or_not_true_are_refused(endpoint):
    def answering(change, counted):
        def answer(path, body, seen):
            choice = completion("one two three", path, body)
            change(choice)
            return Reply({"choices": [choice], "usage": {"completion_tokens": counted}})

        return answer

    def damage(choice):
        if endpoint == "chat":
            choice["logprobs"]["content"][1]["logprob"] = 0.5
        else:
            choice["logprobs"]["token_logprobs"][1] = None

    cases = [
        (lambda choice: choice.update(logprobs=None), 3, "gives no log-probabilities, which are needed here"),
        (lambda choice: None, 40, "counts 40 completion tokens but gives 3 log-probabilities"),
        (lambda choice: None, 2, "counts 2 completion tokens but gives 3 log-probabilities"),
        (damage, 3, "for the token ' two', which is no log-probability"),
    ]
    for change, counted, message in cases:
        with serving(answering(change, counted)) as server:
            assert message in refused(server, with_logprobs=True, endpoint=endpoint)
            assert len(server.requests) == 1  # another try would not help
            if change is not damage:
                ask(server, endpoint=endpoint)  # nobody needs them
    for counted in (3, 4):  # the end token is counted by some
        with serving(answering(lambda choice: None, counted)) as server:
            assert ask(server, with_logprobs=True, endpoint=endpoint)[0][0].logprobs == [-0.75, -1.0, -1.5]


def test_counts_beyond_the_limit_and_prompts_read_otherwise_are_said_once(tiny_lm, tmp_path, capsys):
    def liar(path, body, seen):
        return Reply(
            {"choices": [completion("x", path, body)], "usage": {"prompt_tokens": 99, "completion_tokens": 500}}
        )

    save_language_model(tiny_lm(), tmp_path / "model")
    with serving(liar) as server:
        ask(server, ["ant", "bee"], endpoint="completions", tokenizer=tmp_path / "model")
    said = capsys.readouterr().err
    assert said.count("counts 500 completion tokens where at most 32 were asked for") == 1
    assert said.count("as 99: it adds a token at the beginning, or has another tokenizer") >= 1


def test_options_over_the_completions_endpoint():
    with serving(well_behaved) as server:
        model = remote.open_remote(server.url, "tiny", RemoteConfig(endpoint="completions"))
        scores = remote.score_options(model, prompts("ant", "bee"), [["red", "dark blue"], ["six"]])
    assert scores == [[-1.0, -1.25 - 1.25], [-1.0]]  # 0.25 a letter, the blank included
    assert server.requests[0][1]["prompt"] == "User: ant\n\nAssistant: red"
    assert server.requests[0][1] | {"echo": True, "logprobs": 1, "max_tokens": 1} == server.requests[0][1]


def test_options_with_a_token_in_front_or_across_the_border():
    def with_bos(path, body, seen):
        choice = completion(f"{body['prompt']} and", path, body)
        choice["logprobs"]["tokens"].insert(0, "<s>")
        choice["logprobs"]["token_logprobs"].insert(0, None)
        return Reply({"choices": [choice]})

    def across(path, body, seen):
        return Reply({"choices": [completion(body["prompt"].replace(" ", "") + " and", path, body)]})

    def no_echo(path, body, seen):
        return Reply({"choices": [completion("red", path, body)]})

    for answer, expected in ((with_bos, -1.0), (across, "does not send the prompt's"), (no_echo, "does not send the")):
        with serving(answer) as server:
            model = remote.open_remote(server.url, "tiny", RemoteConfig(endpoint="completions"))
            if isinstance(expected, float):
                assert remote.score_options(model, prompts("ant"), [["red"]]) == [[expected]]
                continue
            with pytest.raises(InputError, match=expected):
                remote.score_options(model, prompts("ant"), [["red", "blue"]])
            assert len(server.requests) == 1
    merged = lambda path, body, seen: Reply(  # noqa: E731
        {
            "choices": [
                {"text": "", "logprobs": {"tokens": ["User: ant\n\nAssis", "tant: red"], "token_logprobs": [None, -1]}}
            ]
        }
    )
    with serving(merged) as server:
        model = remote.open_remote(server.url, "tiny", RemoteConfig(endpoint="completions"))
        with pytest.raises(InputError, match="the option ' red' begins inside one of its tokens"):
            remote.score_options(model, prompts("ant"), [["red"]])


def test_options_over_the_chat_endpoint():
    def listing(path, body, seen):
        assert body["max_tokens"] == 1 and body["top_logprobs"] == 20
        top = [{"token": token, "logprob": math.log(p)} for token, p in ((" A", 0.4), ("A", 0.2), ("B", 0.1))]
        choice = completion("A", path, body)
        choice["logprobs"]["content"] = [{"token": " A", "logprob": math.log(0.4), "top_logprobs": top}]
        return Reply({"choices": [choice]})

    with serving(listing) as server:
        model = remote.open_remote(server.url, "tiny", RemoteConfig())
        ((a, b, c),) = remote.score_options(model, prompts("ant"), [["A", "B", "C"]])
        assert (a, b) == (pytest.approx(math.log(0.6)), pytest.approx(math.log(0.1))) and math.isnan(c)
    with serving(well_behaved) as server:
        model = remote.open_remote(server.url, "tiny", RemoteConfig())
        with pytest.raises(InputError, match="gives no log-probabilities"):
            remote.score_options(model, prompts("ant"), [["A", "B"]])


# ---------------------------------------------------------------------------------------------- failures that may pass


def fails_first(times, failure):
    """Return a server that fails `times` times in a row for each body, then answers."""
    counts = {}

    def answer(path, body, seen):
        key = json.dumps(body, sort_keys=True)
        counts[key] = counts.get(key, 0) + 1
        return failure if counts[key] <= times else well_behaved(path, body, seen)

    return answer


FAILURES = {
    "503: overloaded": Reply({"error": {"message": "overloaded"}}, 503),
    "429: slow down": Reply("slow down", 429),
    "500: boom": Reply({"detail": "boom"}, 500),
    "its answer is not JSON ('<html> busy')": Reply("<html>\nbusy"),
    "its answer is not JSON": Reply('{"choices": [', 200),
    "the server disconnected midway": Reply({"choices": [{"text": "x" * 500}]}, cut=True),
    "its answer holds no completions (choices: Field required)": Reply({}),
    "its answer holds no completions (choices: List should have at least 1 item": Reply({"choices": []}),
    "its answer holds no completions (choices.0.message.content": Reply({"choices": [{"message": {"content": 3}}]}),
    "an error inside an answer (all nodes are busy)": Reply({"error": "all nodes are busy"}),
}


@pytest.mark.parametrize("message", FAILURES)
def test_failures_that_may_pass_are_retried_and_named_in_the_end(message, tmp_path):
    with serving(fails_first(3, FAILURES[message])) as server:
        assert len(ask(server, ["ant", "bee"])) == 2
        assert len(server.requests) == 8
    with serving(fails_first(4, FAILURES[message])) as server:
        line = refused(server, journal=tmp_path / "j.jsonl")
        assert len(server.requests) == 4
    assert f"failed 4 times, lastly: {message}" in line
    assert f"finished requests are kept in {tmp_path / 'j.jsonl'}, run the same command again to go on" in line


def test_pauses_grow_with_jitter_from_a_named_stream(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("qinglan.models.server.asyncio.sleep", sleep)
    for _ in range(2):
        with serving(fails_first(9, FAILURES["500: boom"])) as server:
            refused(server, retry_delay=1.0, max_retries=8)
    first, again = slept[:8], slept[8:]
    assert first == again
    for attempt, pause in enumerate(first):
        assert min(60, 2**attempt) / 2 <= pause <= min(60, 2**attempt)
    assert len({pause / min(60, 2**attempt) for attempt, pause in enumerate(first)}) == 8


def test_retry_after_is_obeyed(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("qinglan.models.server.asyncio.sleep", sleep)
    with serving(fails_first(1, Reply("wait", 429, {"Retry-After": "7"}))) as server:
        ask(server)
    with serving(fails_first(1, Reply("wait", 503, {"Retry-After": formatdate(time.time() + 30)}))) as server:
        ask(server)
    assert slept[0] == 7 and 25 < slept[1] < 31
    with serving(fails_first(1, Reply("out of money", 429, {"Retry-After": "86400"}))) as server:
        assert "is not to be asked again for 86400 seconds (429: out of money)" in refused(server)
    assert (retry_after(None), retry_after("soon"), retry_after("-3")) == (None, None, 0.0)


def test_a_server_without_a_sign_of_life_is_given_up():
    def asleep(path, body, seen):
        time.sleep(0.5)
        return well_behaved(path, body, seen)

    with serving(asleep) as server:
        line = refused(server, timeout=0.05, max_retries=1)
    assert "failed 2 times, lastly: no answer within 0.05 seconds (--remote.timeout)" in line


# ------------------------------------------------------------------------------------------------- failures that stay


def test_no_server_no_address():
    with serving(well_behaved) as server:
        pass
    started = time.monotonic()
    assert "no server answers there" in refused(server, max_retries=6, retry_delay=10)
    assert time.monotonic() - started < 5  # a mistyped address is told at once
    for url in ("localhost:8000", "ftp://x", "http://", "tiny"):
        server.url = url
        assert f"--server {url}: is no address" in refused(server)
    assert base_address("http://x:1/openai/v1/") == "http://x:1/openai/v1"
    assert base_address("https://x/api/v3") == "https://x/api/v3"
    assert base_address("http://x:1") == "http://x:1/v1"


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_goes_away_midway_is_waited_for(comes_back):
    def leaves(path, body, seen):
        server.go_away()
        if comes_back:
            back.start()
        honest = well_behaved(path, body, seen)
        return Reply(honest.body, headers={"Connection": "close"})

    with serving(leaves) as server, ExitStack() as later:
        back = threading.Timer(0.2, lambda: later.enter_context(serving(well_behaved, server.port)))
        if comes_back:
            assert len(ask(server, ["ant", "bee", "cat"], retry_delay=0.1, max_retries=6)) == 3
            back.join()
        else:
            line = refused(server, ["ant", "bee", "cat"])
            assert "failed 4 times, lastly: the server is gone" in line


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({"error": {"message": "bad key"}}, 401), "refuses access (401: bad key); there is no key in"),
        (Reply({"error": {"message": "not yours"}}, 403), "refuses access (403: not yours)"),
        (
            Reply({"error": {"message": "The model `big` does not exist."}}, 404),
            "knows no model 'big' (404: The model `big` does not exist.); it offers tiny, other; correct --model",
        ),
        (
            Reply({"detail": "Server is pinned to 'tiny'; requested 'big'."}, 400),
            "knows no model 'big' (400: Server is pinned to 'tiny'; requested 'big'.); it offers tiny, other",
        ),
        (Reply({"detail": "max_tokens is too large"}, 400), "refuses the request (400: max_tokens is too large)"),
        (Reply("moved", 301), "refuses the request (301: moved)"),
        (Reply("", 418), "refuses the request (418: I'm a Teapot)"),
    ],
)
def test_failures_that_stay_are_told_at_once(reply, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda *_: reply) as server:
        assert message in refused(server, ["ant", "bee"], model="big")
        assert len(server.requests) == 1
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        line = refused(server, ["ant"], model="big")
        assert reply.status != 401 or "the key in the environment variable OPENAI_API_KEY is not taken" in line


def test_an_endpoint_that_is_missing():
    with serving(lambda *_: Reply({"detail": "Not Found"}, 404)) as server:
        line = refused(server)
    assert "has no /chat/completions, or no model 'tiny' (404: Not Found)" in line and "--remote.endpoint" in line


@pytest.mark.parametrize("changes", [{"finish_reason": None}, "absent"])
def test_a_missing_finish_reason_is_told(changes):
    def answer(path, body, seen):
        choice = completion("one", path, body)
        if changes == "absent":
            del choice["finish_reason"]
        else:
            choice |= changes
        return Reply({"choices": [choice]})

    with serving(answer) as server:
        assert "a completion has no finish_reason" in refused(server)


# -------------------------------------------------------------------------------------------------- what looks strange


def test_completions_that_are_all_alike_or_repeat_the_prompt_are_said(capsys):
    greedy = lambda path, body, seen: Reply({"choices": [completion("yes", path, body)] * body.get("n", 1)})  # noqa: E731
    with serving(greedy) as server:
        ask(server, ["ant", "bee", "cat"], 2)
        assert "the server seems to be greedy" in capsys.readouterr().err
        ask(server, ["ant", "bee", "cat"], 2, sampling=SamplingConfig(temperature=0))
        assert "greedy" not in capsys.readouterr().err

    def parrot(path, body, seen):
        return Reply({"choices": [completion(f"<|user|> {body['messages'][-1]['content']} ...", path, body)]})

    with serving(parrot) as server:
        ask(server, ["what is an ant", "what is a bee", "what is a cat"])
        assert "the server does not know this model's chat template" in capsys.readouterr().err
    with serving(well_behaved) as server:
        ask(server, ["say ant", "say bee", "say cat"], 2)
        assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- journal


def test_only_what_is_missing_is_sent_again(tmp_path):
    journal = tmp_path / "deep" / "requests.jsonl"
    texts = [f"w{number}" for number in range(10)]

    def dies_at_six(path, body, seen):
        return well_behaved(path, body, seen) if seen < 6 else Reply({"error": {"message": "expired"}}, 401)

    with serving(dies_at_six) as server:
        assert "expired" in refused(server, texts, 2, journal=journal, max_concurrency=1)
        assert len(server.requests) == 7  # at the first refusal nothing more is sent
    kept = journal.read_text()
    assert len(kept.splitlines()) == 6
    with serving(well_behaved) as server:  # at another address
        rows = ask(server, texts, 2, journal=journal)
        assert len(server.requests) == 4
        assert ask(server, texts, 2) == rows and len(server.requests) == 14
        assert ask(server, texts, 2, journal=journal) == rows and len(server.requests) == 14
        ask(server, texts, 2, journal=journal, sampling=SamplingConfig(max_new_tokens=31))
        assert len(server.requests) == 24  # other settings are other requests
    assert journal.read_text().startswith(kept)


def test_what_is_under_way_when_another_request_fails_is_kept(tmp_path):
    journal = tmp_path / "j.jsonl"

    def answer(path, body, seen):
        if seen == 1:
            return Reply("no", 400)
        time.sleep(0.1 if seen > 1 else 0)
        return well_behaved(path, body, seen)

    with serving(answer) as server:
        refused(server, ["a", "b", "c", "d", "e", "f"], journal=journal, max_concurrency=3)
        assert len(server.requests) == 4
    assert len(journal.read_text().splitlines()) == 3  # the first, and the two beside the failed one


def test_answers_that_were_not_understood_are_not_kept(tmp_path):
    journal = tmp_path / "j.jsonl"
    with serving(lambda path, body, seen: Reply({"choices": [completion("x", path, {})]})) as server:
        refused(server, with_logprobs=True, journal=journal)
    assert journal.read_text() == ""
    with serving(well_behaved) as server:
        assert ask(server, with_logprobs=True, journal=journal)[0][0].logprobs


def test_a_journal_cut_short_goes_on_and_another_file_is_refused(tmp_path):
    journal = tmp_path / "j.jsonl"
    with serving(well_behaved) as server:
        rows = ask(server, ["ant", "bee", "cat"], journal=journal)
        whole = journal.read_text()
        lines = whole.splitlines(keepends=True)
        for cut in (len(whole) - 1, len(whole) - 2, len(lines[0]) + len(lines[1]) + 5, len(lines[0]) + 1):
            journal.write_text(whole[:cut])
            sent = len(server.requests)
            assert ask(server, ["ant", "bee", "cat"], journal=journal) == rows
            assert len(server.requests) - sent == 3 - len(whole[:cut].splitlines()[: whole[: cut + 1].count("\n")])
            assert [json.loads(line)["key"] for line in journal.read_text().splitlines()]
        journal.write_text("not\nours\n")
        assert f"{journal}:1: is no line of a journal of requests" in refused(server, journal=journal)
        assert journal.read_text() == "not\nours\n"
        assert "cannot be written" in refused(server, journal=tmp_path)
        other = Journal(tmp_path / "mine.jsonl")
        assert "another process is writing it" in refused(server, journal=tmp_path / "mine.jsonl")
        other.close()
        ask(server, journal=tmp_path / "mine.jsonl")


def test_killed_midway_the_command_goes_on(tmp_path, capsys):
    file, to = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say w{number}"}) + "\n" for number in range(9)))
    reached = threading.Event()

    def answer(path, body, seen):
        if seen == 5:
            reached.set()
            time.sleep(60)
        return well_behaved(path, body, seen)

    importlib.import_module("qinglan.commands.use")  # so that the child has it at once
    with serving(answer) as server:
        command = ["sample", "--server", server.url, "--model", "tiny", "--prompts", str(file), "--to", str(to)]
        command += ["--num-samples", "2", "--remote.max-concurrency", "1", "--json"]
        process = multiprocessing.get_context("fork").Process(target=cli.run, args=(command,))
        process.start()
        assert reached.wait(60)
        process.kill()
        process.join()
        assert not to.exists()
        before = len(server.requests)
        capsys.readouterr()
        assert cli.run(command) == 0
    assert json.loads(capsys.readouterr().out)["num_prompts"] == 9
    assert len(server.requests) - before == 4  # five answers were in the journal
    assert len(to.read_text().splitlines()) == 9 + 18


def test_the_command_prints_what_a_server_wrote_and_refuses_in_one_line(capsys):
    with serving(well_behaved) as server:
        command = ["sample", "--server", server.url, "--model", "tiny", "--text", "say ant"]
        assert cli.run([*command, "--num-samples", "2"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("user: say ant\n  > about ant by ") and out.count("  > ") == 2
        for more, message in (
            (["--remote.tokenizer", "nowhere"], "--remote.endpoint completions"),
            (["--remote.endpoint", "completions", "--remote.tokenizer", "nowhere"], "nowhere"),
            (["--remote.max-concurrency", "0"], "remote.max_concurrency"),
        ):
            assert cli.run([*command, *more]) == 2
            assert message in capsys.readouterr().err
    assert cli.run(["sample", "--model", "nano", "--text", "Hi", "--remote.timeout", "3"]) == 2
    assert "there is none; add --server URL" in capsys.readouterr().err
