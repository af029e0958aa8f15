"""The sampler's verbs over any OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, our own.

`sample_completions` and `score_options` take and return what those of `generate.py` and `options.py` do, with a
`RemoteModel` for the model. What a server says about itself is checked before it is believed: fewer completions than
asked for, log-probabilities that are missing or of another number than the tokens counted, prompts that it reads as
other tokens, completions that are all alike although they were to be drawn. What cannot be mended is one line; what is
suspicious is said once on standard error.

Departures: a server's completions have no token ids, so PPO cannot train on them; equal seeds give equal completions
only where the server keeps that promise. With stop texts, most servers do not say whether a text ended by itself or by
one of them: `finish_reason` is then "stop".
"""

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, FinishReason, Message, Prompt, Sampler, record_id
from qinglan.core.rng import stream_seed
from qinglan.core.run import Progress
from qinglan.models.answers import Answer, Choice, choice_logprobs, choices_of, option_logprob, top_logprob
from qinglan.models.chat import ChatFormat, make_chat_format, plain_prompt
from qinglan.models.directory import load_tokenizer
from qinglan.models.sampling import SamplingConfig
from qinglan.models.server import Ask, Refused, RemoteConfig, Server

T = TypeVar("T")


class RemoteModel(NamedTuple):
    """A model on a server."""

    url: str
    name: str
    """Its name on the server; the `producer_id` of what it writes."""
    config: RemoteConfig
    chat: ChatFormat | None
    """How the prompt of the completions endpoint is written; None: as plain text."""


class RemoteSample(NamedTuple):
    """One completion as a server sent it."""

    text: str
    finish_reason: FinishReason | None
    """None where the server gives a reason of its own, such as a content filter."""
    logprobs: list[float] | None
    """Nats, one for each of the server's tokens, as the server computes them; None if they were not asked for."""


def open_remote(url: str, name: str, config: RemoteConfig) -> RemoteModel:
    """Return a model on a server; nothing is sent yet. Raises `InputError` for an unusable tokenizer directory."""
    if config.tokenizer is None:
        return RemoteModel(url, name, config, None)
    if config.endpoint == "chat":
        raise InputError(
            "--remote.tokenizer: the chat endpoint writes prompts with the server's template; leave it out, or add "
            "--remote.endpoint completions"
        )
    return RemoteModel(url, name, config, make_chat_format(load_tokenizer(config.tokenizer)))


def sample_completions(
    remote: RemoteModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int,
    num_samples: int = 1,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Draw `num_samples` completions of each prompt record; returns records as [prompt][sample].

    Raises `InputError` as `generate` does.
    """
    drawn = generate(remote, prompts, config, seed=seed, num_samples=num_samples, progress=progress)
    sampler = Sampler(
        policy=remote.name, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seed=seed
    )
    return [
        [
            Completion(
                id=record_id("completion", prompt.id, sampler, index, sample.text),
                source="policy",
                producer_id=remote.name,
                prompt_group_id=prompt.prompt_group_id,
                split=prompt.split,
                parents=(prompt.id,),
                prompt_id=prompt.id,
                text=sample.text,
                finish_reason=sample.finish_reason,
                sampler=sampler,
            )
            for index, sample in enumerate(samples)
        ]
        for prompt, samples in zip(prompts, drawn, strict=True)
    ]


def generate(
    remote: RemoteModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int,
    num_samples: int = 1,
    with_logprobs: bool = False,
    progress: Progress | None = None,
) -> list[list[RemoteSample]]:
    """Draw `num_samples` completions of each prompt from the server; returns them as [prompt][sample].

    Args:
        remote: the model.
        prompts: conversations; their ids name the seeds that are sent.
        config: how to draw; memory and rows are the server's business.
        seed: of the seeds that are sent and of the pauses between retries.
        num_samples: K, asked for by `n`; a server that ignores or refuses `n` is asked K times.
        with_logprobs: ask for the tokens' log-probabilities, and refuse an answer without them.
        progress: shown at every prompt that is done; its total should be `len(prompts) * num_samples`.

    Raises:
        InputError: no server, no access, no such model, a refused request, log-probabilities that are missing or do
            not fit the tokens counted, an answer without a finish reason, or failures beyond the last retry.
    """
    if num_samples < 1:
        raise InputError(f"num_samples: got {num_samples}; expected at least 1")
    return _run(_sample_all(remote, prompts, config, seed, num_samples, with_logprobs, progress))


def score_options(
    remote: RemoteModel, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], *, seed: int = 0
) -> list[list[float]]:
    """Return the log-probability, in nats, that a completion of each prompt begins with each of its options.

    The completions endpoint sends prompt and option back with log-probabilities (`echo`), one request an option. The
    chat endpoint gives the most probable first tokens only: one request a prompt, options of one token each, and NaN
    ("could not be scored") for an option that is not among the 20 most probable.

    Raises `InputError` as `generate` does, and where the server does not echo or an option begins inside a token.
    """
    if len(options) != len(prompts):
        raise InputError(f"options: got {len(options)} lists for {len(prompts)} prompts; expected one for each")
    return _run(_score_all(remote, prompts, options, seed))


class _Work(NamedTuple):
    """What one call of `generate` asks for."""

    server: Server
    remote: RemoteModel
    config: SamplingConfig
    seed: int
    with_logprobs: bool


async def _sample_all(
    remote: RemoteModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    seed: int,
    num_samples: int,
    with_logprobs: bool,
    progress: Progress | None,
) -> list[list[RemoteSample]]:
    drawn: list[list[RemoteSample]] = [[] for _ in prompts]
    num_done = 0

    async def one(number: int) -> None:
        nonlocal num_done
        drawn[number] = await _sample(work, prompts[number], num_samples)
        num_done += num_samples
        if progress is not None:
            progress.show(num_done)

    async with Server(remote.url, remote.name, remote.config, seed) as server:
        work = _Work(server, remote, config, seed, with_logprobs)
        if prompts:
            await one(0)  # alone: it shows whether the server is there, and what it can do
        await _together(server, [one(number) for number in range(1, len(prompts))])
        _look_at(server, prompts, drawn, config)
    return drawn


async def _sample(work: _Work, prompt: Prompt, num_samples: int) -> list[RemoteSample]:
    """Draw the samples of one prompt: by one request, and one by one what that did not bring."""
    found: list[RemoteSample] = []
    server = work.server
    if num_samples > 1 and server.takes_n is not False:
        try:
            found = (await _ask(work, prompt, 0, num_samples))[:num_samples]
        except Refused:
            if server.takes_n:
                raise
        server.takes_n = len(found) == num_samples
        if not server.takes_n:
            server.say(f"gives {len(found)} of the {num_samples} completions that `n` asks for; asked one by one")
    rest = range(len(found), num_samples)
    alone = await _together(server, [_ask(work, prompt, number, 1) for number in rest])
    return found + [samples[0] for samples in alone]


async def _ask(work: _Work, prompt: Prompt, sample: int, count: int) -> list[RemoteSample]:
    """Send one request for `count` completions, the first of which has the number `sample`."""
    config, remote, server = work.config, work.remote, work.server
    seed = stream_seed(work.seed, "remote", prompt.id, sample) & 0x7FFFFFFF  # some servers take 32 bits
    body: dict[str, Any] = {"model": remote.name, **_prompt_fields(remote, prompt)}
    body |= {"temperature": config.temperature, "max_tokens": config.max_new_tokens, "seed": seed}
    body |= {"n": count} if count > 1 else {}
    body |= {"top_p": config.top_p} if config.top_p < 1 else {}
    body |= {"top_k": config.top_k} if config.top_k > 0 else {}
    body |= {"stop": list(config.stop)} if config.stop else {}
    if work.with_logprobs:
        body["logprobs"] = True if remote.config.endpoint == "chat" else 1

    def read(payload: Any) -> list[RemoteSample]:
        answer = choices_of(payload, server.base)
        logprobs = choice_logprobs(answer, server.base) if work.with_logprobs else [None] * len(answer.choices)
        _check_counts(server, remote, answer, body)
        return [
            RemoteSample(*_text_and_reason(choice, config.stop, server.base), values)
            for choice, values in zip(answer.choices, logprobs, strict=True)
        ]

    return await server.ask(_with_extra(server, Ask(_path(remote), body, sample)), read)


def _check_counts(server: Server, remote: RemoteModel, answer: Answer, body: dict[str, Any]) -> None:
    """Say where the server's counts show that it read, or wrote, something else than it was asked for."""
    usage = answer.usage
    if usage is None:
        return
    most = body["max_tokens"] * len(answer.choices)
    if usage.completion_tokens is not None and usage.completion_tokens > most:
        server.say(
            f"counts {usage.completion_tokens} completion tokens where at most {most} were asked for: it ignores "
            "max_tokens, or thinks aside"
        )
    if remote.chat is not None and usage.prompt_tokens is not None:
        ours = len(remote.chat.tokenizer.encode(body["prompt"], add_special_tokens=False))
        if usage.prompt_tokens != ours:
            server.say(
                f"reads a prompt of {ours} tokens as {usage.prompt_tokens}: it adds a token at the beginning, or has "
                "another tokenizer than --remote.tokenizer"
            )


def _text_and_reason(choice: Choice, stops: Sequence[str], base: str) -> tuple[str, FinishReason | None]:
    """Return a choice's text, cut at its first stop text as the sampler cuts it, and why it ended."""
    text = choice.content
    places = [place for place in map(text.find, stops) if place >= 0]
    if places:
        return text[: min(places)].strip(), "stop"
    reason: FinishReason | None = None
    if choice.finish_reason is None:
        raise InputError(f"{base}: a completion has no finish_reason, so nobody knows whether it is whole; ask another")
    if choice.finish_reason == "length":
        reason = "length"
    elif choice.finish_reason in ("stop", "eos", "eos_token", "end_turn"):
        by_itself = not stops or ("stop_reason" in choice.model_fields_set and not isinstance(choice.stop_reason, str))
        reason = "eos" if by_itself else "stop"
    return text.strip(), reason


def _look_at(
    server: Server, prompts: Sequence[Prompt], drawn: Sequence[Sequence[RemoteSample]], config: SamplingConfig
) -> None:
    """Say what looks wrong with all completions together."""
    strange = sum(sample.finish_reason is None for row in drawn for sample in row)
    if strange:
        server.say(f"{strange} completions ended for a reason of its own, such as a content filter")
    repeated = [row for row in drawn if len(row) > 1]
    if config.temperature > 0 and len(repeated) > 2 and all(len({one.text for one in row}) == 1 for row in repeated):
        server.say(
            f"all completions of a prompt are alike at temperature {config.temperature:g}: the server seems to be "
            "greedy; let it sample, or tell it by --remote.extra-body"
        )
    questions = [prompt.messages[-1].content.strip() for prompt in prompts]
    echoes = [
        question in sample.text for question, row in zip(questions, drawn, strict=True) for sample in row if question
    ]
    if len(echoes) > 2 and all(echoes):
        server.say(
            "all completions repeat their prompt: the server does not know this model's chat template; try "
            "--remote.endpoint completions with --remote.tokenizer DIR"
        )


async def _score_all(
    remote: RemoteModel, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], seed: int
) -> list[list[float]]:
    async with Server(remote.url, remote.name, remote.config, seed) as server:
        if remote.config.endpoint == "chat":
            asked = [_score_first(server, remote, *one) for one in zip(prompts, options, strict=True)]
            return await _first_alone(server, asked)
        pairs = [(prompt, text) for prompt, texts in zip(prompts, options, strict=True) for text in texts]
        scores = iter(await _first_alone(server, [_score_echo(server, remote, *pair) for pair in pairs]))
        return [[next(scores) for _ in texts] for texts in options]


async def _score_first(server: Server, remote: RemoteModel, prompt: Prompt, options: Sequence[str]) -> list[float]:
    body = {"model": remote.name, **_prompt_fields(remote, prompt), "temperature": 1.0, "max_tokens": 1}
    ask = _with_extra(server, Ask(_path(remote), body | {"logprobs": True, "top_logprobs": 20}, 0))
    return await server.ask(
        ask, lambda payload: [top_logprob(choices_of(payload, server.base), text, server.base) for text in options]
    )


async def _score_echo(server: Server, remote: RemoteModel, prompt: Prompt, option: str) -> float:
    before = _prompt_fields(remote, prompt)["prompt"]
    if remote.chat is None:
        after = f" {option.strip()}"
    else:
        prompt_ids = remote.chat.prompt_ids(prompt.messages)
        whole = remote.chat.tokenizer.decode([*prompt_ids, *remote.chat.completion_ids(option)[:-1]])
        after = str(whole)[len(before) :]
    # A token has to be asked for; it stands behind the echo and is not read.
    body = {"model": remote.name, "prompt": before + after, "temperature": 1.0, "max_tokens": 1}
    ask = _with_extra(server, Ask(_path(remote), body | {"echo": True, "logprobs": 1}, 0))
    return await server.ask(
        ask, lambda payload: option_logprob(choices_of(payload, server.base), before + after, after, server.base)
    )


def _path(remote: RemoteModel) -> str:
    return "/chat/completions" if remote.config.endpoint == "chat" else "/completions"


def _prompt_fields(remote: RemoteModel, prompt: Prompt) -> dict[str, Any]:
    """Return the fields of a request that hold the prompt."""
    messages: tuple[Message, ...] = prompt.messages
    if remote.config.endpoint == "chat":
        return {"messages": [{"role": message.role, "content": message.content} for message in messages]}
    if remote.chat is None:
        return {"prompt": plain_prompt(messages)}
    return {"prompt": str(remote.chat.tokenizer.decode(remote.chat.prompt_ids(messages)))}


def _with_extra(server: Server, ask: Ask) -> Ask:
    """Return the request with the user's own fields; null removes one."""
    body = ask.body | server.extra
    return ask._replace(body={name: value for name, value in body.items() if value is not None})


async def _first_alone(server: Server, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do the first piece of work alone, so that a server that is not there is asked once, then the rest together."""
    try:
        first = await _together(server, work[:1])
    except InputError:
        for one in work[1:]:
            one.close()
        raise
    return first + await _together(server, work[1:])


async def _together(server: Server, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all of `work`; at the first error nothing more is sent, what is under way ends and is kept, then it raises."""
    tasks = [asyncio.ensure_future(one) for one in work]
    if not tasks:
        return []
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    failed = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
    if failed:
        server.is_stopped = True
        await asyncio.gather(*tasks, return_exceptions=True)
        raise failed[0]
    return [await task for task in tasks]


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
