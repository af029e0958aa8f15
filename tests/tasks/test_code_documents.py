"""Documents about code: true in what they say, short enough, and readable back into programs by the real tokenizer."""

import random
import re

import pytest
from transformers import PreTrainedTokenizerBase

from qinglan.tasks import corpus
from qinglan.tasks.base_models import base_tokenizer
from qinglan.tasks.code import is_held_out
from qinglan.tasks.code_cases import draw_task, failed_cases, load
from qinglan.tasks.code_documents import (
    CODE_MIX,
    MAX_PIECES,
    constants_of,
    draw_program,
    num_pieces,
    numbered,
    read_program,
)
from qinglan.tasks.code_phrases import code_spans, fragments, phrases
from qinglan.tasks.document import EOS, VERDICT, Document, Span
from qinglan.tasks.item import Draw


def text_of(document: Document) -> str:
    return " ".join(span.text for span in document)


def drawing(seed: object, held_out: bool = False) -> Draw:
    return Draw(random.Random(repr(seed)), held_out)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerBase:
    return base_tokenizer()


def test_shares_add_up() -> None:
    assert sum(share for share, _ in CODE_MIX.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", CODE_MIX)
def test_documents_are_text_with_weights_that_fits(kind: str, trained: PreTrainedTokenizerBase) -> None:
    draw = drawing(kind)
    lengths = []
    for _ in range(60):
        document = CODE_MIX[kind][1](draw)
        assert all(span.text.strip() and 0.0 < span.weight <= VERDICT for span in document)
        text = text_of(document)
        assert "{" not in text and num_pieces(text) <= MAX_PIECES
        ids, weights = corpus.document_ids(trained.backend_tokenizer, document)  # type: ignore[arg-type]
        assert len(ids) == len(weights)
        lengths.append(len(ids))
    assert max(lengths) <= 256 and 60 < sum(lengths) / len(lengths) < 220


def test_spans_of_code_have_the_tokens_of_the_undivided_text(trained: PreTrainedTokenizerBase) -> None:
    draw = drawing(0)
    for number in range(100):
        task = draw_task(draw, "hard" if number % 2 else "basic")
        text = draw_program(draw, task) + "\n"
        spans = code_spans(text, constants_of(task))
        whole = trained.backend_tokenizer.encode(text, add_special_tokens=False).ids
        parts = [
            one for span in spans for one in trained.backend_tokenizer.encode(span.text, add_special_tokens=False).ids
        ]
        assert parts == whole and text_of(spans) == text
        # What a model writes after the specification, decoded, is the program again.
        assert read_program(trained.decode(whole)) == text.rstrip("\n")
        assert len(whole) < (115 if number % 2 else 100) * 1.4


def test_line_breaks_with_indentation_are_single_tokens(trained: PreTrainedTokenizerBase) -> None:
    ids = trained("def f(xs):\n    if x:\n        return 1\n", add_special_tokens=False).input_ids
    pieces = [trained.decode([one]) for one in ids]
    assert "\n   " in pieces and "\n       " in pieces and pieces[-1] == "\n" and " return" in pieces


def test_constants_of_the_specification_weigh_three_times_as_much() -> None:
    spans = code_spans("def f(xs):\n    if x > 3:\n        out += x * 5", {"3"})
    assert spans == [
        Span("def f(xs):\n    if x >", 1.0),
        Span("3:\n       ", 3.0),
        Span("out += x * 5", 1.0),
    ]
    assert code_spans("w.endswith('a')", {"a"}, 0.5) == [Span("w.endswith('a')", 1.5)]


def test_programs_are_read_out_of_any_text() -> None:
    text = "def f(xs):\n    return 1"
    for written in (
        text,
        f" {text}\n",
        f"Here it is:\n{text}\n Tests: f([]) must be",
        f"{text}\n2 def f(xs):",
        f"{text}\n{text}",
        f"```\n{text}\n```",
    ):
        assert read_program(written) == text
    assert read_program("") == read_program("I do not know.") == ""


def test_numbered_lines() -> None:
    assert numbered("def f(xs):\n    return 1") == "1 def f(xs):\n2     return 1"


def held_out_free(kind: str, count: int) -> list[str]:
    draw = drawing(kind)
    return [text_of(CODE_MIX[kind][1](draw)) for _ in range(count)]


def test_documents_keep_to_compositions_that_are_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from qinglan.tasks import code_documents

    seen = []
    true_draw = code_documents.draw_task

    def watched(*args: object, **settings: object) -> object:
        task = true_draw(*args, **settings)  # type: ignore[arg-type]
        seen.append(task)
        return task

    monkeypatch.setattr(code_documents, "draw_task", watched)
    for kind in CODE_MIX:
        draw = drawing(kind)
        for _ in range(40):
            CODE_MIX[kind][1](draw)
    assert len(seen) > 100 and not any(is_held_out(task.composition) for task in seen)


def test_other_specifications_in_documents_are_not_held_out_either(monkeypatch: pytest.MonkeyPatch) -> None:
    from qinglan.tasks import code_documents

    seen = []
    monkeypatch.setattr(code_documents, "specification", lambda draw, composition: seen.append(composition) or "x.")
    draw = drawing(0)
    for _ in range(60):
        code_documents.specifications(draw)
    assert len(seen) > 100 and not any(is_held_out(composition) for composition in seen)


def test_tests_in_documents_tell_the_truth() -> None:
    verdicts = {"passed": 0, "failed": 0}
    for text in held_out_free("program_with_tests", 60):
        function = load(read_program(text))
        lines = re.findall(r"(f\(.*\)) must be (.+) and is (.+): (passed|failed)", text)
        for call, right, got, verdict in lines:
            assert function(*eval(call, {"f": lambda *arguments: arguments})) == eval(got)
            assert (right == got) == (verdict == "passed")
            verdicts[verdict] += 1
        assert text.endswith("tests: failed." if any(line[3] == "failed" for line in lines) else "tests: passed.") or (
            len(lines) < 3 and text.endswith("tests: failed.")  # a call that raised an exception is not shown
        )
    assert min(verdicts.values()) > 20


def test_bug_reports_quote_a_line_of_the_program() -> None:
    clean = 0
    for text in held_out_free("bug_report", 80):
        program, review = text.split(" Review: ")
        if review == "no fault found.":
            clean += 1
            continue
        in_line = re.match(r"fault in line (\d+): (.+)\n (.+\.) Fix: ", review)
        plain = re.match(r"fault in: (.+)\n (.+\.) Fix: ", review)
        lines = [line.strip() for line in program[program.index("def ") :].splitlines()]
        unnumbered = [re.sub(r"^\d+ +", "", line) for line in lines]
        if in_line:
            assert unnumbered[int(in_line[1]) - 1] == in_line[2]
        else:
            assert plain is not None and plain[1] in lines
    assert 10 < clean < 40


def test_verdicts_on_programs_and_phrases_are_right() -> None:
    from qinglan.tasks import code_documents

    draw = drawing(3)
    counts = {"correct.": 0, "wrong.": 0}
    for _ in range(60):
        task = draw_task(draw, num_cases=8)
        draw_of_document = drawing(_)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(code_documents, "draw_task", lambda *args, task=task, **settings: task)
            text = text_of(code_documents.judged_programs(draw_of_document))
        for shown in re.findall(r"def f.*?Verdict: \w+\.", text, re.DOTALL):
            verdict = shown.split()[-1]
            assert bool(failed_cases(read_program(shown), task.cases)) == (verdict == "wrong.")
            counts[verdict] += 1
    assert min(counts.values()) > 15


def test_phrases_stand_for_their_code() -> None:
    texts = [text_of(phrases(drawing(seed))) for seed in range(300)]
    lines = [line for text in texts for line in text.replace("\n ", "\n").split("\n") if ": " in line]
    said = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in lines}
    assert said["keep the even ones"] in ("if x % 2 == 0:", "if x % 2 != 0: continue")
    assert said["leave out the last"] in ("xs[:-1]", "ws[:-1]") and said["return the product"] == "out = 1"
    assert said["square each"] == "x * x" and said["for an empty list"] in ("if not xs:", "if not ws:")
    assert any("return the product: out = 1\nout *= x\n" in text for text in texts)


def test_expressions_in_fragments_are_judged_rightly() -> None:
    counts = {"correct.": 0, "wrong.": 0}
    known = {"square each": "x * x", "keep the even ones": "x % 2 == 0", "put each in capitals": "w.upper()"}
    for seed in range(800):
        text = text_of(fragments(drawing(seed)))
        for phrase, shown in re.findall(r"([a-z][a-z0-9 ]+):((?: [^:]+? (?:correct|wrong)\.)+)", text):
            for expression, verdict in re.findall(r" (.+?) (correct\.|wrong\.)", shown):
                if phrase in known:
                    assert (expression == known[phrase]) == (verdict == "correct."), (phrase, expression)
                    counts[verdict] += 1
    assert min(counts.values()) > 10


def test_conversations_end_with_the_reply() -> None:
    texts = [text for text in held_out_free("program", 60) if "<|user|>" in text]
    assert 5 < len(texts) < 30 and all(
        text.endswith(EOS) and read_program(text.removesuffix(EOS).split("<|assistant|>")[1]) for text in texts
    )
