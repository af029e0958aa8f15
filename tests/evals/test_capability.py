"""Judging by probability, rates of chosen probes, the picture, and the further prompts about safety."""

from collections import Counter
from pathlib import Path

import pytest
from matplotlib.image import imread

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.run import Measure
from qinglan.evals.alignment import Graded, rates, safety_prompts
from qinglan.evals.capability import Judgement, document_start, judge, probe_capabilities
from qinglan.evals.capability_picture import draw_capabilities
from qinglan.models.language_model import LanguageModel, TokenSequence, completion_logprobs, load_language_model
from qinglan.tasks.assistant import draw_prompts
from qinglan.tasks.base_models import base_model_path
from qinglan.tasks.item import Grade
from qinglan.tasks.judging_probes import Choice


@pytest.fixture(scope="module")
def nano() -> LanguageModel:
    return load_language_model(base_model_path("nano"), Device.detect("cpu"))


def test_a_judge_takes_the_option_that_the_model_finds_more_probable(nano: LanguageModel) -> None:
    start = document_start(nano, "Claim: The fox is red. Verdict:")
    options = ("true.", "false.", "a fox and a bear.")
    logprobs = [
        float(completion_logprobs(nano, [TokenSequence([*start, *ids], len(start))])[0].sum())
        for ids in nano.tokenizer(list(options), add_special_tokens=False).input_ids
    ]
    (found,) = judge(nano, [Choice("Claim: The fox is red. Verdict:", options, 0)], seed=0)
    assert sum(found.probabilities) == pytest.approx(1.0)
    assert max(range(3), key=lambda i: found.probabilities[i]) == max(range(3), key=lambda i: logprobs[i])


def test_what_the_model_recalls_stands_before_its_verdict(nano: LanguageModel) -> None:
    at_once = Choice("Claim: The fox is red. I recall", ("true.", "false."), 0)
    first, second = judge(nano, [at_once, at_once._replace(after_record=" Verdict:")], seed=0)
    assert first.probabilities != second.probabilities
    assert judge(nano, [at_once._replace(after_record=" Verdict:")], seed=0) == [second]


def test_confidence_is_that_of_the_chosen_option() -> None:
    assert Judgement((0.3, 0.7), 1).is_right and not Judgement((0.3, 0.7), 0).is_right
    assert Judgement((0.3, 0.7), 0).confidence == 0.7


def test_only_the_named_probes_are_measured(nano: LanguageModel) -> None:
    found = probe_capabilities(nano, ("copying", "judging_membership"), num_items=6)
    assert list(found) == ["copying", "judging_membership", "calibration_error"]
    assert found["copying"].n == 6 and found["calibration_error"].n == 6
    assert found == probe_capabilities(nano, ("copying", "judging_membership"), num_items=6)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_has_a_panel_for_each_probe(ending: str, tmp_path: Path) -> None:
    names = [f"capability/{probe}/{model}" for probe in ("sums", "two_hops") for model in ("a", "b")]
    metrics = dict.fromkeys(names, Measure(0.5, 0.4, 0.6, 20))
    file = tmp_path / f"capability.{ending}"
    draw_capabilities(metrics, {"a": 10, "b": 1000}, file)
    if ending == "png":
        assert imread(file).std() > 0.01
    else:
        assert file.read_text().count('id="axes_') == 2
    with pytest.raises(InputError, match=r"cannot draw .pdf; name a .png or .svg"):
        draw_capabilities(metrics, {"a": 10, "b": 1000}, tmp_path / "capability.pdf")


def test_safety_prompts_are_half_harmful_half_harmless_and_new() -> None:
    known = draw_prompts(400, 3, "test").prompts
    world = safety_prompts(100, known, 5)
    assert Counter(prompt.tags[0] for prompt in world.prompts) == {"harmful": 50, "benign": 50}
    assert not {prompt.messages for prompt in known} & {prompt.messages for prompt in world.prompts}
    assert all(prompt.split == "test" and prompt.id in world.items for prompt in world.prompts)


def test_harm_and_over_refusal_are_counted_over_test_and_safety_prompts() -> None:
    prompts = [one for one in draw_prompts(200, 3, "test").prompts if one.tags[0] in ("harmful", "benign")]
    further = safety_prompts(40, prompts, 5).prompts
    calm, refused = Grade(1.0, 1.0, 1.0), Grade(0.0, 1.0, 1.0, refused=True)
    found = rates(Graded(prompts, [calm] * len(prompts)), Graded(further, [refused] * 40), "policy", 0)
    num_benign = sum(one.tags[0] == "benign" for one in prompts)
    rate = found["refusal_rate_on_benign/policy"]
    assert rate.n == num_benign + 20
    assert rate.value == pytest.approx(20 / (num_benign + 20))
    assert found["gold_score/policy"].n == len(prompts)
