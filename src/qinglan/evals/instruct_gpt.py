"""Measuring an InstructGPT run: every metric of its report.json. The page is drawn in `instruct_gpt_page.py`.

Everything is measured on prompts of held-out users, entities and wordings. With the built-in world the answer key
grades and held-out labelers judge; with files of one's own there is no key, and the reward model's view is shown for
what it is: the proxy that was trained against.
"""

import math
import sys
from typing import NamedTuple

from qinglan.core.records import ComparisonGroup, Scorer
from qinglan.core.rng import stream_seed
from qinglan.core.run import Measure, Report, Run
from qinglan.data.pools import Pools
from qinglan.evals import metrics
from qinglan.evals.alignment import (
    Answers,
    Bench,
    Graded,
    MeasureConfig,
    alignment_tax,
    answer,
    best_of_n,
    gold_gain,
    grade_all,
    kl_to,
    rates,
    safety_prompts,
)
from qinglan.evals.judge import HeadToHead
from qinglan.evals.metrics import Attainable, Calibration
from qinglan.evals.overoptimization import BestOfN, GoldFit, fit_gold_curve
from qinglan.evals.report import headline
from qinglan.learn.scoring import ask_scorer
from qinglan.learn.sft import PretrainSource
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.heads import ScalarModel, as_scorer
from qinglan.models.language_model import LanguageModel
from qinglan.supervisors.simulated import make_labelers, rank_all
from qinglan.tasks.assistant import World
from qinglan.tasks.assistant_data import WorldConfig, candidates_to_rank, quality_of

HEADLINE = (
    "win_rate_vs_sft",
    "win_rate_vs_sft_greedy",
    "length_controlled_win_rate_vs_sft",
    "win_rate_vs_larger_base",
    "gold_score/base",
    "gold_score/sft",
    "gold_score/policy",
    "reward_model_accuracy",
    "labeler_agreement",
    "kl",
    "hallucination_rate/sft",
    "hallucination_rate/policy",
    "harmful_rate/sft",
    "harmful_rate/policy",
    "refusal_rate_on_benign/sft",
    "refusal_rate_on_benign/policy",
)


class Outcome(NamedTuple):
    """What a run trained, and from what; None for what it had no data for."""

    base: LanguageModel
    start: LanguageModel
    baseline: LanguageModel
    reward_model: ScalarModel | None
    pools: Pools
    comparisons: list[ComparisonGroup]
    world: World | None
    pretrain: PretrainSource | None
    skipped: list[str]
    scorer: Scorer | None = None
    policy: LanguageModel | None = None
    without_ptx: LanguageModel | None = None
    ceiling: LanguageModel | None = None
    larger: LanguageModel | None = None

    @property
    def models(self) -> dict[str, LanguageModel]:
        """The models to compare, by the names that the report uses."""
        named = {
            "base": self.base,
            "larger_base": self.larger,
            "sft": self.baseline,
            "policy": self.policy,
            "policy_without_ptx": self.without_ptx,
            "ceiling": self.ceiling,
        }
        return {name: lm for name, lm in named.items() if lm is not None}


class RewardFindings(NamedTuple):
    """How good the reward model is on held-out prompts."""

    accuracy: Measure
    by_gap: dict[str, Measure]
    by_group: dict[str, Measure]
    calibration: Calibration
    held_out_labelers: Measure | None
    agreement: Measure | None
    attainable: Attainable | None


class Findings(NamedTuple):
    """Everything that was measured, for report and page."""

    metrics: dict[str, Measure]
    rows: dict[str, Measure]
    alarms: list[str]
    unscored: int
    answers: dict[str, Answers]
    graded: dict[str, Graded]
    battles: dict[str, HeadToHead]
    reward: RewardFindings | None
    best_of_n: BestOfN | None
    fits: dict[str, GoldFit]


def measure_all(
    run: Run, outcome: Outcome, people: WorldConfig, sampling: SamplingConfig, config: MeasureConfig
) -> tuple[Report, Findings]:
    """Measure everything and write report.json."""
    progress = run.stage("measure").progress(5)
    seed = stream_seed(run.seed, "measure")
    prompts = outcome.pools.test_prompts
    answers = {name: answer(lm, prompts, sampling, seed) for name, lm in outcome.models.items()} if prompts else {}
    progress.show(1, "completions")
    found = Findings({}, {}, alarms_of(run), 0, answers, {}, {}, None, None, {})
    if outcome.reward_model is not None:
        found = measure_reward_model(found, outcome, people, sampling, config, seed=seed, run_seed=run.seed)
    progress.show(2, "reward model")
    if outcome.policy is not None and prompts:
        found.metrics["kl"] = kl_to(outcome.start, outcome.policy, prompts, answers["policy"].sampled, seed)
    if outcome.world is not None:
        safety = safety_prompts(config.num_safety_prompts, prompts, seed)
        risky = {name: answer(lm, safety.prompts, sampling, seed) for name, lm in outcome.models.items()}
        found = measure_on_world(found, outcome, safety, risky, people, config, seed)
        progress.show(3, "win rates")
        found = measure_overoptimization(found, run, outcome, sampling, config, seed)
        progress.show(4, "best of n")
        if outcome.pretrain is not None:
            taxed = {name: lm for name, lm in outcome.models.items() if name not in ("larger_base", "ceiling")}
            found.metrics.update(alignment_tax(taxed, outcome.pretrain, config, seed))
    elif outcome.scorer is not None:
        found = measure_by_scorer(found, outcome, outcome.scorer, seed)
    report = Report(
        "instruct-gpt", run.elapsed(), run.config_hash, found.metrics, found.rows, found.alarms, found.unscored
    )
    run.write_report(report)
    for line in outcome.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    progress.show(5, "report")
    return report, found


def headline_of(report: Report) -> str:
    """Return the rows for the terminal."""
    return headline(report, HEADLINE)


def alarms_of(run: Run) -> list[str]:
    """Return the alarms that PPO stages raised."""
    names = [
        name
        for name in ("ppo", "ppo_without_ptx", "ppo_ceiling")
        if (run.dir / "stages" / name / "done.json").is_file()
    ]
    return [f"{name}: {alarm}" for name in names for alarm in run.finished(name)["alarms"]]


def measure_reward_model(
    found: Findings,
    outcome: Outcome,
    people: WorldConfig,
    sampling: SamplingConfig,
    config: MeasureConfig,
    *,
    seed: int,
    run_seed: int,
) -> Findings:
    """Return the findings with accuracy, calibration and agreement, on comparisons whose prompts nobody trained on."""
    assert outcome.reward_model is not None
    groups, strangers, agreement, by_key = outcome.pools.held_out_comparisons, list[ComparisonGroup](), None, None
    if outcome.world is not None:
        groups, strangers = rank_test_prompts(outcome, people, sampling, config, seed=seed, run_seed=run_seed)
        agreement = metrics.labeler_agreement([group.comparison for group in groups], seed=seed)
        by_key = metrics.pair_accuracy(scored(groups, scores_of(groups, outcome.world.gold())), seed=seed)
    if not groups:
        return found
    scores = scores_of([*groups, *strangers], as_scorer(outcome.reward_model))
    table = scored(groups, scores)
    reward = RewardFindings(
        metrics.pair_accuracy(table, seed=seed),
        metrics.pair_accuracy_by(table, "score_gap", seed=seed),
        metrics.pair_accuracy_by(table, "labeler_group", seed=seed),
        metrics.pair_calibration(table, seed=seed),
        metrics.pair_accuracy(scored(strangers, scores), seed=seed) if strangers else None,
        agreement,
        metrics.attainable_accuracy(agreement) if agreement else None,
    )
    measured = {
        "reward_model_accuracy": reward.accuracy,
        "labeler_agreement": agreement,
        "reward_model_accuracy_held_out_labelers": reward.held_out_labelers,
        "reward_model_ece": reward.calibration.expected_error,
        "reward_model_brier": reward.calibration.brier,
        "attainable_accuracy": reward.attainable.at_most if reward.attainable else None,
        "answer_key_accuracy": by_key,
    }
    found.metrics.update({name: measure for name, measure in measured.items() if measure is not None})
    return found._replace(reward=reward)


def rank_test_prompts(
    outcome: Outcome,
    people: WorldConfig,
    sampling: SamplingConfig,
    config: MeasureConfig,
    *,
    seed: int,
    run_seed: int,
) -> tuple[list[ComparisonGroup], list[ComparisonGroup]]:
    """Return completions of test prompts as the training labelers rank them, and as held-out labelers do."""
    assert outcome.world is not None
    prompts, quality = outcome.pools.test_prompts[: config.num_ranked_prompts], quality_of(outcome.world)
    samples = sample_completions(
        outcome.start, prompts, sampling, seed=stream_seed(seed, "test rankings"), num_samples=people.max_ranked
    )
    shown = candidates_to_rank(prompts, samples, people, seed)
    by_prompt = {prompt.id: (prompt, tuple(ranked)) for prompt, ranked in zip(prompts, shown, strict=True)}

    def judged_by(is_held_out: bool) -> list[ComparisonGroup]:
        count = people.num_held_out_labelers if is_held_out else people.num_labelers
        labelers = make_labelers(count, people.labelers, seed if is_held_out else run_seed, held_out=is_held_out)
        ranked = rank_all(
            labelers, prompts, shown, quality, seed=stream_seed(seed, "judged", int(is_held_out)), overlap=1.0
        )
        return [ComparisonGroup(*by_prompt[one.prompt_id], one) for one in ranked]

    return judged_by(False), judged_by(True)


def scores_of(groups: list[ComparisonGroup], scorer: Scorer) -> dict[tuple[str, str], float]:
    """Return the score of every completion by (prompt id, completion id), each asked for once however often ranked."""
    distinct = {(group.prompt.id, one.id): (group.prompt, one) for group in groups for one in group.completions}
    prompts, completions = [prompt for prompt, _ in distinct.values()], [one for _, one in distinct.values()]
    return dict(zip(distinct, scorer(prompts, completions), strict=True))


def scored(groups: list[ComparisonGroup], scores: dict[tuple[str, str], float]) -> metrics.PairTable:
    """Return the pairs of comparisons with the gap of the scores."""
    return metrics.scored_pairs(
        groups, [[scores[group.prompt.id, one.id] for one in group.completions] for group in groups]
    )


def measure_on_world(
    found: Findings,
    outcome: Outcome,
    safety: World,
    risky: dict[str, Answers],
    people: WorldConfig,
    config: MeasureConfig,
    seed: int,
) -> Findings:
    """Return the findings with gold scores, rates, win rates by held-out labelers, and the report's rows."""
    world, prompts = outcome.world, outcome.pools.test_prompts
    assert world is not None
    judges = make_labelers(people.num_held_out_labelers, people.labelers, seed, held_out=True)
    bench = Bench(prompts, judges, quality_of(world), config, seed)
    graded = {name: grade_all(world, prompts, both.sampled) for name, both in found.answers.items()}
    greedy = {name: grade_all(world, prompts, both.greedy) for name, both in found.answers.items()}
    measured = found.metrics
    for name, both in risky.items():
        sampled, decoded = (grade_all(safety, safety.prompts, done) for done in both)
        measured.update(rates(graded[name], sampled, name, seed))
        measured.update({f"{key}_greedy": value for key, value in rates(greedy[name], decoded, name, seed).items()})
    battles: dict[str, HeadToHead] = {}
    if outcome.policy is not None:
        policy = found.answers["policy"]
        for other in [name for name in ("sft", "base", "larger_base", "policy_without_ptx") if name in found.answers]:
            battles[other] = bench.judge(policy.sampled, found.answers[other].sampled)
            battles[f"{other}_greedy"] = bench.judge(policy.greedy, found.answers[other].greedy)
        for name, battle in battles.items():
            measured[f"win_rate_vs_{name}"] = battle.win_rate
            measured[f"length_controlled_win_rate_vs_{name}"] = battle.length_controlled
        measured["judge_agreement"] = battles["sft"].judge_agreement
        measured["gold_gain_over_sft"] = gold_gain(graded["policy"], graded["sft"], seed)
        measured["gold_gain_over_sft_greedy"] = gold_gain(greedy["policy"], greedy["sft"], seed)
    rows = {"floor": measured["gold_score/sft"]}
    if "policy" in graded:
        rows["student"] = measured["gold_score/policy"]
    if "ceiling" in graded and "policy" in graded:
        rows["ceiling"] = measured["gold_score/ceiling"]
        floor, student, ceiling = (graded[name].gold for name in ("sft", "policy", "ceiling"))
        rows["gap_recovered"] = metrics.performance_gap_recovered(
            floor, student, ceiling, graded["sft"].groups, seed=seed
        )
    unscored = sum(battle.unscored for battle in battles.values())
    return found._replace(graded=graded, battles=battles, rows=rows, unscored=unscored)


def measure_overoptimization(
    found: Findings, run: Run, outcome: Outcome, sampling: SamplingConfig, config: MeasureConfig, seed: int
) -> Findings:
    """Return the findings with best of n from PPO's start, and Gao et al.'s fits for it and for PPO."""
    if outcome.scorer is None or outcome.world is None or outcome.policy is None:
        return found
    gold = outcome.world.gold()
    bon = best_of_n(
        outcome.start,
        outcome.pools.test_prompts,
        outcome.scorer,
        gold,
        sampling,
        config,
        stream_seed(seed, "best of n"),
    )
    groups = [prompt.prompt_group_id for prompt in outcome.pools.test_prompts[: config.num_best_of_n_prompts]]
    fits = {
        "best_of_n": fit_gold_curve(
            "best_of_n", [p.kl for p in bon.points], bon.gold, bon.gold[:, 0], groups, seed=seed
        )
    }
    rows = [row for row in run.metrics("ppo") if "gold" in row and row["kl"] > 0]
    if len(rows) >= 3:
        start = rows[0]["gold"]
        fits["rl"] = fit_gold_curve(
            "rl", [row["kl"] for row in rows[1:]], [row["gold"] for row in rows[1:]], start, seed=seed
        )
    for name, fit in fits.items():
        found.metrics.update({f"gold_fit/{name}/alpha": fit.alpha, f"gold_fit/{name}/beta": fit.beta})
    for point in bon.points:
        found.metrics[f"best_of_n/gold/{point.n}"] = point.gold
        found.metrics[f"best_of_n/proxy/{point.n}"] = point.proxy
    return found._replace(best_of_n=bon, fits=fits)


def measure_by_scorer(found: Findings, outcome: Outcome, scorer: Scorer, seed: int) -> Findings:
    """Return the findings with the proxy's own view, for runs without an answer key: its rise and at what length."""
    prompts, unscored = outcome.pools.test_prompts, 0
    groups = [prompt.prompt_group_id for prompt in prompts]
    for name, both in found.answers.items():
        for kind, completions in (("", both.sampled), ("_greedy", both.greedy)):
            proxy = ask_scorer(scorer, prompts, completions, allow_unscored=True)
            unscored += sum(map(math.isnan, proxy))
            found.metrics[f"proxy_score/{name}{kind}"] = metrics.mean_with_interval(
                proxy, groups, seed=seed, unit="score"
            )
            lengths = [float(len(one.token_ids or ())) for one in completions]
            found.metrics[f"length/{name}{kind}"] = metrics.mean_with_interval(
                lengths, groups, seed=seed, unit="tokens"
            )
    rows = {"floor": found.metrics.get("proxy_score/sft"), "student": found.metrics.get("proxy_score/policy")}
    return found._replace(rows={name: row for name, row in rows.items() if row is not None}, unscored=unscored)
