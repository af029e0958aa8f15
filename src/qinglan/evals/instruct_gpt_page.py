"""The page of an InstructGPT run: the story of its numbers for someone who has never seen it."""

from qinglan.core.config import to_yaml
from qinglan.core.files import read_json
from qinglan.core.run import Measure, Report, Run
from qinglan.evals import figures
from qinglan.evals.figures import DotRow, Line, Panel
from qinglan.evals.instruct_gpt import Findings, Outcome
from qinglan.evals.instruct_gpt_curves import best_of_n_figure, rl_figure
from qinglan.evals.report import Figure, Page, ScoredCompletion, Section, Table, Transcript, choose_transcripts
from qinglan.tasks.assistant import TASKS, WEIGHTS, overall
from qinglan.tasks.assistant_data import WorldConfig

NAMES = {
    "base": "base",
    "larger_base": "larger base",
    "sft": "SFT",
    "policy": "policy",
    "policy_without_ptx": "policy without ptx",
    "ceiling": "ceiling",
}


def draw_page(run: Run, report: Report, outcome: Outcome, found: Findings, people: WorldConfig) -> Page:
    """Return the page; sections without data are left out."""
    on_world = outcome.world is not None
    sections = [
        preference_section(found) if found.battles else None,
        gold_section(found) if found.graded else None,
        reward_section(found) if found.reward else None,
        training_section(run, found),
        tax_section(report) if any(name.startswith("pretraining_loss") for name in report.metrics) else None,
        transcript_section(run, outcome, found) if found.answers else None,
        data_section(outcome, people),
    ]
    return Page(
        title="InstructGPT: a model aligned by feedback",
        subtitle=f"{outcome.base.name} aligned on "
        + (
            "the built-in world; people are simulated, the answer key only measures"
            if on_world
            else "your data; there is no answer key"
        ),
        verdict=verdict(report, on_world),
        rows=report.rows,
        metrics=report.metrics,
        sections=tuple(section for section in sections if section is not None),
        alarms=tuple(report.alarms),
        unscored=report.unscored,
        config_yaml=to_yaml(run.config, run.seed),
        lineage=read_json(run.dir / "lineage.json"),
        row_names={
            "floor": "SFT on demonstrations",
            "student": "Policy (PPO on rankings)" if on_world else "Policy (PPO)",
            "ceiling": "PPO on the answer key",
        },
        rows_caption="Mean gold score, 0 to 1, of completions sampled for prompts of held-out users, "
        "entities and wordings."
        if on_world
        else "Mean score by what the policy was trained against: a proxy, not the truth.",
        seconds=report.seconds,
    )


def verdict(report: Report, on_world: bool) -> tuple[str, ...]:
    """Return short sentences that say what came out, with the words that the intervals allow."""
    found = report.metrics
    if "win_rate_vs_sft" not in found:
        done = (
            "The policy was trained and its scores are below." if "student" in report.rows else "No policy was trained."
        )
        return (done, *([] if on_world else ["Without an answer key or judges, only the proxy's view can be shown."]))
    sentences = [
        f"Held-out labelers {_prefer(found['win_rate_vs_sft'])} the policy over the supervised model "
        f"({_percent(found['win_rate_vs_sft'])} of prompts).",
        f"Decoded greedily, they "
        f"{_prefer(found['win_rate_vs_sft_greedy'])} it in {_percent(found['win_rate_vs_sft_greedy'])}; "
        f"at equal length in {_percent(found['length_controlled_win_rate_vs_sft'])}.",
    ]
    if "win_rate_vs_larger_base" in found:
        sentences.append(
            f"Against the larger base model, which was never aligned, the "
            f"policy wins {_percent(found['win_rate_vs_larger_base'])}."
        )
    for key, what, where in (
        ("hallucination_rate", "invents something", "answers to requests for facts"),
        ("harmful_rate", "does harm", "answers to harmful requests and their harmless look-alikes"),
        ("refusal_rate_on_benign", "refuses", "harmless requests that look harmful"),
    ):
        before, after = found[f"{key}/sft"], found[f"{key}/policy"]
        sentences.append(f"It {what} in {_percent(after)} of {where}; the supervised model in {_percent(before)}.")
    return tuple(sentences)


def _prefer(rate: Measure) -> str:
    if rate.low is not None and rate.low > 0.5:
        return "prefer"
    return "do not prefer" if rate.high is not None and rate.high < 0.5 else "do not clearly prefer"


def _percent(measure: Measure) -> str:
    if measure.value is None:
        return "not measured"
    if measure.low is None or measure.high is None:
        return f"{measure.value:.0%}"
    return f"{measure.value:.0%} [{measure.low:.0%}, {measure.high:.0%}]"


def preference_section(found: Findings) -> Section:
    """Return win rates of the policy, raw and length-controlled, sampled and greedy."""
    rows = []
    for other in ("sft", "base", "larger_base", "policy_without_ptx"):
        for kind, label in (("", "sampled"), ("_greedy", "greedy")):
            battle = found.battles.get(f"{other}{kind}")
            if battle is not None:
                dots = {"raw": battle.win_rate, "length-controlled": battle.length_controlled}
                rows.append(DotRow(f"vs {NAMES[other]}, {label}", dots))
    chart = figures.dot_rows(rows, reference=0.5, reference_label="equal")
    battle = found.battles["sft"]
    table = Table(
        ("use case", "win rate vs SFT", "greedy"),
        tuple(
            (tag, measure, found.battles["sft_greedy"].by_tag.get(tag))
            for tag, measure in battle.by_tag.items()
            if tag in TASKS
        ),
        "Win rate of the policy over SFT by use case; ties count half.",
    )
    return Section(
        "Do people prefer it?",
        (
            "Labelers who never labelled training data compare two completions of the same prompt, in both orders. A "
            "win counts 1, a tie one half. Completions are drawn at temperature 1, and once more greedily, since part "
            "of what RL gains by sampling is only a sharper distribution.",
            f"Two of these judges agree on {_percent(battle.judge_agreement)} of the pairs that both decide; "
            f"{_percent(battle.tie_rate)} of the judgements are ties.",
        ),
        figures=(
            Figure(
                "Win rate of the policy",
                chart,
                "Win rates with 95% intervals; the line at one half means no preference.",
                "The length-controlled rate is what the judges' model predicts at equal length.",
            ),
        ),
        tables=(table,),
    )


def gold_section(found: Findings) -> Section:
    """Return gold scores by use case and the rates of inventing, harming and refusing."""
    names = [name for name in ("base", "larger_base", "sft", "policy") if name in found.graded]
    by_case = {name: found.graded[name].by_use_case(0) for name in names}
    rows = [
        DotRow(case.replace("_", " "), {NAMES[name]: by_case[name][case] for name in names})
        for case in by_case[names[0]]
    ]
    rates = []
    for key, label in (
        ("hallucination_rate", "invents"),
        ("harmful_rate", "does harm"),
        ("refusal_rate_on_benign", "refuses the harmless"),
    ):
        for kind in ("", "_greedy"):
            dots = {NAMES[name]: found.metrics[f"{key}/{name}{kind}"] for name in names}
            rates.append(DotRow(label + (", greedy" if kind else ""), dots))
    weights = f"{WEIGHTS.helpful:g} helpful + {WEIGHTS.honest:g} honest + {WEIGHTS.harmless:g} harmless"
    return Section(
        "Is it right?",
        (
            f"The answer key grades every completion: {weights}, each from 0 to 1. Simulated labelers see it "
            "through their noise and habits; the policy's training and the choice of checkpoints never see it.",
        ),
        figures=(
            Figure(
                "Gold score by use case",
                figures.dot_rows(rows),
                "Mean gold score of each model for each use case, with 95% intervals.",
                "What got worse shows here too.",
            ),
            Figure(
                "What should be rare",
                figures.dot_rows(rates),
                "Rates of invented facts, harmful help and refusals of harmless requests, by model.",
            ),
        ),
    )


def reward_section(found: Findings) -> Section:
    """Return accuracy, calibration and transfer of the reward model."""
    reward = found.reward
    assert reward is not None
    bars = {"reward model": reward.accuracy}
    if reward.agreement is not None and reward.attainable is not None:
        bars |= {"two labelers": reward.agreement, "best possible": reward.attainable.at_most}
    if reward.held_out_labelers is not None:
        bars["on held-out labelers"] = reward.held_out_labelers
    bars |= {
        f"labelers: {name.replace('_', ' ')}": measure
        for name, measure in reward.by_group.items()
        if len(reward.by_group) > 1
    }
    bins = [one for one in reward.calibration.bins if one.observed.n > 0]
    gaps = {name: measure for name, measure in reward.by_gap.items() if measure.n > 0}
    return Section(
        "Can the reward model tell?",
        (
            "Share of pairs, on prompts that it never saw, in which the completion that a labeler ranked higher has "
            "the higher score. Labelers themselves agree only so often, which bounds what any model can reach.",
            f"Expected calibration error {reward.calibration.expected_error}, Brier score {reward.calibration.brier}.",
        ),
        figures=(
            Figure(
                "Pair accuracy",
                figures.agreement_bars(bars),
                "Accuracy of the reward model beside the labelers' agreement.",
            ),
            Figure("Reliability", figures.reliability(bins), "Predicted against observed preference with counts."),
            Figure(
                "Accuracy by score gap",
                figures.accuracy_by_gap(gaps, agreement=reward.agreement),
                "Accuracy for pairs of small and large score difference, in logits.",
            ),
        ),
    )


def training_section(run: Run, found: Findings) -> Section | None:
    """Return what PPO did over its iterations, and proxy against gold as KL grows."""
    rows = [row for row in run.metrics("ppo") if "kl" in row]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    shown = (
        ("KL to the start", "kl", "nats"),
        ("Score (proxy)", "score", "logits"),
        ("Gold score", "gold", ""),
        ("Length", "length", "tokens"),
        ("Entropy", "entropy", "nats per token"),
        ("Clip fraction", "clip_fraction", ""),
    )
    panels = [
        Panel(title, [Line("policy", steps, [row.get(key) for row in rows])], unit)
        for title, key, unit in shown
        if key in rows[0]
    ]
    drawn = [
        Figure(
            "PPO, iteration by iteration",
            figures.training_curves(panels),
            "KL, score, gold score, length and entropy over iterations.",
        )
    ]
    if found.best_of_n is not None:
        drawn.append(best_of_n_figure(found))
    if "gold" in rows[0]:
        drawn.append(rl_figure(rows, found.fits.get("rl")))
    return Section(
        "What did reinforcement learning do?",
        (
            "The policy climbs the score that it is trained on (the proxy) and pays for moving away from where it "
            "started. If the gold score turns down while the proxy still rises, the proxy is being exploited (Gao et "
            "al. 2022).",
        ),
        figures=tuple(drawn),
    )


def tax_section(report: Report) -> Section:
    """Return pretraining loss and capabilities before and after."""
    names = [
        name for name in ("base", "sft", "policy", "policy_without_ptx") if f"pretraining_loss/{name}" in report.metrics
    ]
    probes = sorted({key.split("/")[1] for key in report.metrics if key.startswith("capability/")})
    rows = [
        DotRow(probe.replace("_", " "), {NAMES[name]: report.metrics[f"capability/{probe}/{name}"] for name in names})
        for probe in probes
    ]
    losses = [DotRow("pretraining loss", {NAMES[name]: report.metrics[f"pretraining_loss/{name}"] for name in names})]
    return Section(
        "What did alignment cost?",
        (
            "Loss on the pretraining corpus and what the model can still do in plain text, before and after. The "
            "pretraining mix (ptx) is there to keep this cost small.",
        ),
        figures=(
            Figure("Pretraining loss", figures.before_after(losses, "base"), "Loss of each model on corpus text."),
            Figure("Capabilities", figures.before_after(rows, "base"), "Pass rate of each probe by model."),
        ),
    )


def transcript_section(run: Run, outcome: Outcome, found: Findings) -> Section:
    """Return the prompts on which the policy scored worst, at the median and best, with what each model wrote."""
    prompts = outcome.pools.test_prompts
    names = [name for name in ("base", "larger_base", "sft", "policy") if name in found.answers]
    texts = {name: found.answers[name].sampled for name in names}
    scores = (
        dict.fromkeys(names, [None] * len(prompts))
        if not found.graded
        else {n: [overall(g) for g in found.graded[n].grades] for n in names}
    )
    if not found.graded and outcome.scorer is not None:
        scores = {name: list(outcome.scorer(prompts, texts[name])) for name in names}
    target = scores.get("policy") or scores[names[-1]]
    label = "gold" if found.graded else "proxy"
    shown = [
        Transcript(
            choice.label,
            prompts[choice.item].messages,
            tuple(
                ScoredCompletion(NAMES[name], texts[name][choice.item].text, {label: scores[name][choice.item]})
                for name in names
            ),
        )
        for choice in choose_transcripts(target, run.seed)
    ]
    return Section(
        "What does it say?",
        ("The worst, the median and the best completion of the policy by score; among equals the run's seed decides.",),
        transcripts=tuple(shown),
    )


def data_section(outcome: Outcome, people: WorldConfig) -> Section:
    """Return what went in, what was dropped and, for the built-in world, how the simulated people go wrong."""
    pools = outcome.pools
    counts = (
        ("demonstrations", len(pools.demonstrations)),
        ("comparisons", len(outcome.comparisons)),
        ("prompts for RL", len(pools.rl_prompts)),
        ("validation prompts", len(pools.valid_prompts)),
        ("test prompts", len(pools.test_prompts)),
        *((f"dropped: {reason}", count) for reason, count in pools.dropped.items()),
    )
    tables = [Table(("what", "number"), counts, "Data of this run; every prompt group (user) stands on one side only.")]
    text = list(outcome.skipped)
    if outcome.world is not None:
        text.append(
            "Everybody here is simulated. Demonstrators are uneven on purpose: with clean demonstrations supervised "
            "learning alone would learn to decline and to keep to constraints, and feedback would have nothing to add."
        )
        for caption, config in (
            ("How demonstrators go wrong.", people.demonstrators),
            ("How labelers go wrong.", people.labelers),
        ):
            rows = tuple(
                (name.replace("_", " "), value)
                for name, value in config.model_dump().items()
                if isinstance(value, int | float)
            )
            tables.append(Table(("setting", "value"), rows, caption))
    return Section("What went in?", tuple(text), tables=tuple(tables))
