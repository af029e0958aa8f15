"""InstructGPT (Ouyang et al. 2022): demonstrations -> SFT -> rankings of K completions -> reward model -> PPO.

Departures from the paper, all of them settings:
1. models of 0.2M to 2M parameters on a built-in world; people are simulated, their faults printed in the report;
2. the small preset takes 1 pretraining sequence per episode (paper: 8), 4 samples of a prompt in a rollout (paper: 1,
   and the same prompts again in later passes), a larger learning rate and a larger beta;
3. the reward model starts from the larger pretrained model (paper: one of 6B for policies of 1.3B and more);
4. PPO on the answer key itself, with the same settings, is shown as the ceiling.

One CPU, minutes:   qinglan quickstart
Your own model:     qinglan instruct-gpt --model DIR --demonstrations F --comparisons F --prompts F
Expected numbers with their spread stand in docs/results.md.
"""

from pathlib import Path

from qinglan.cli import CommandResult, Options
from qinglan.core.device import Device, prepare_process
from qinglan.core.records import ComparisonGroup, Scorer
from qinglan.core.rng import stream_seed
from qinglan.core.run import Run, Stage
from qinglan.data.load import load_comparisons
from qinglan.data.pools import Pools
from qinglan.data.write import write_comparisons
from qinglan.evals.alignment import mean_score, range_of
from qinglan.evals.instruct_gpt import Outcome, headline_of, measure_all
from qinglan.evals.instruct_gpt_page import draw_page
from qinglan.evals.report import write_page
from qinglan.learn.ppo import train_ppo
from qinglan.learn.ppo_config import PPOConfig
from qinglan.learn.reward import train_reward_model
from qinglan.learn.reward_function import load_reward_function
from qinglan.learn.sft import train_sft
from qinglan.models.generate import sample_completions
from qinglan.models.heads import as_scorer
from qinglan.models.language_model import LanguageModel, load_language_model
from qinglan.recipes.instruct_gpt_config import InstructGPTConfig
from qinglan.recipes.instruct_gpt_data import Data, check_lengths, gather, reward_base
from qinglan.supervisors.simulated import make_labelers, rank_all
from qinglan.tasks.assistant import World
from qinglan.tasks.assistant_data import candidates_to_rank, quality_of
from qinglan.tasks.base_models import resolve_model

__all__ = ["InstructGPTConfig", "main", "quickstart"]


def quickstart(config: InstructGPTConfig, options: Options) -> CommandResult:
    """Run the recipe on the built-in world into runs/quickstart."""
    return main(config, options._replace(out=options.out or Path("runs/quickstart")))


def main(config: InstructGPTConfig, options: Options) -> CommandResult:
    """Run the whole pipeline, then measure and report; stages without data are skipped and said so."""
    prepare_process()
    device = Device.detect(config.device)
    base = load_language_model(resolve_model(config.model), device, template=config.template)
    base = base._replace(name=Path(config.model).name)
    data = gather(config, base, options.seed)
    check_lengths(config, base, data.pools)
    larger = None
    if config.larger_model is not None and data.world is not None:
        larger = load_language_model(resolve_model(config.larger_model), device)
    judging_base = reward_base(config, base, larger)
    names = {"model": config.model, "larger_model": larger and config.larger_model, "reward_base": config.reward_base}
    inputs = data.files | {role: resolve_model(name) for role, name in names.items() if name}
    out = options.out or Path("runs/instruct-gpt")
    with Run.open(out, config, seed=options.seed, recipe="instruct-gpt", resume=options.resume) as run:
        for name, path in inputs.items():
            run.add_input(name, path)
        outcome = align(config, run, base, judging_base, data)
        if data.world is not None:
            outcome = outcome._replace(larger=larger)
        report, found = measure_all(run, outcome, config.world, config.sampling, config.measure)
        write_page(run.dir / "report.html", draw_page(run, report, outcome, found, config.world))
    return CommandResult(f"{headline_of(report)}\n{out / 'report.html'}", report.to_json())


def align(config: InstructGPTConfig, run: Run, base: LanguageModel, judging_base: LanguageModel, data: Data) -> Outcome:
    """Train everything, from the base models of policy and reward model to the policy."""
    pools, world, pretrain, seed, skipped = data.pools, data.world, data.pretrain, run.seed, []

    # Student: the policy that PPO starts from, and its reference
    start, stage = base, run.stage("start", config.start, config.template, run.inputs, config.world, config.hygiene)
    if pools.demonstrations:
        mix = config.start if pretrain else config.start.model_copy(update={"pretrain_fraction": 0.0})
        start = train_sft(base, pools.demonstrations, mix, stage=stage, seed=seed, pretrain=pretrain)
        stage.finish()
    else:
        skipped.append("SFT: no demonstrations; PPO starts from the base model.")

    # Supervisor: labelers rank K completions of each prompt (built-in world), or the file's comparisons
    comparisons = pools.comparisons
    if world is not None:
        ranking = run.stage("comparisons", stage, config.world, config.sampling)
        comparisons = ranked_completions(config, start, pools, world, ranking, seed)

    # Learn 1: the reward model
    reward_model, scorer, score_range = None, None, None
    if comparisons:
        labels = [group.comparison.id for group in comparisons]
        stage = run.stage("reward_model", config.reward_model, Path(judging_base.name).name, stage, labels)
        reward_model = train_reward_model(
            judging_base,
            comparisons,
            config.reward_model,
            stage=stage,
            seed=seed,
            valid=pools.held_out_comparisons[:200],
            demonstrations=pools.demonstrations,
        )
        stage.finish()
        scorer = as_scorer(reward_model)
        score_range = range_of(scorer, comparisons[:: max(1, len(comparisons) // 300)])
    else:
        skipped.append("Reward model: no comparisons.")
    scorer = load_reward_function(config.reward) if config.reward is not None else scorer

    # Learn 2: the SFT baseline; the reward model chooses its checkpoint
    baseline = start
    if pools.demonstrations:
        baseline_stage = run.stage("baseline", config.baseline, stage, config.reward, config.sampling)
        select = None if scorer is None else mean_score(scorer, pools.valid_prompts, config.sampling, seed)
        baseline = train_sft(
            base, pools.demonstrations, config.baseline, stage=baseline_stage, seed=seed, select=select
        )
        baseline_stage.finish()
    outcome = Outcome(base, start, baseline, reward_model, pools, comparisons, world, pretrain, skipped, scorer)
    if scorer is None:
        skipped.append("PPO: neither comparisons nor a reward function.")
        return outcome

    # Learn 3: the policy; the same without the pretraining mix; the same against the answer key, as the ceiling
    seen_scores = score_range if config.reward is None else None

    def ppo(name: str, settings: PPOConfig, reward: Scorer, seen: tuple[float, float] | None) -> LanguageModel:
        ppo_stage = run.stage(name, settings, stage, config.reward)
        gold = world.gold() if world is not None else None
        result = train_ppo(
            start,
            start,
            reward,
            pools.rl_prompts,
            settings,
            stage=ppo_stage,
            seed=seed,
            value_start=reward_model,
            pretrain=pretrain,
            gold=gold,
            score_range=seen,
        )
        ppo_stage.finish({"alarms": result.alarms})
        return result.policy

    settings = config.ppo if pretrain else config.ppo.model_copy(update={"ptx_coef": 0.0})
    outcome = outcome._replace(policy=ppo("ppo", settings, scorer, seen_scores))
    if world is not None and config.compare_without_ptx and settings.ptx_coef > 0:
        plain = settings.model_copy(update={"ptx_coef": 0.0})
        outcome = outcome._replace(without_ptx=ppo("ppo_without_ptx", plain, scorer, seen_scores))
    if world is not None and config.train_ceiling:
        outcome = outcome._replace(ceiling=ppo("ppo_ceiling", settings, world.gold(scale=5.0), None))
    return outcome


def ranked_completions(
    config: InstructGPTConfig, policy: LanguageModel, pools: Pools, world: World, stage: Stage, seed: int
) -> list[ComparisonGroup]:
    """Sample completions and let labelers rank them with ties; kept in the run as records, like people's own."""
    file = stage.dir / "comparisons.jsonl"
    if not stage.is_done:
        prompts, people = (
            pools.comparison_prompts,
            make_labelers(config.world.num_labelers, config.world.labelers, seed),
        )
        samples = sample_completions(
            policy, prompts, config.sampling, seed=stream_seed(seed, "to rank"), num_samples=config.world.max_ranked
        )
        shown = candidates_to_rank(prompts, samples, config.world, seed)
        judged = rank_all(people, prompts, shown, quality_of(world), seed=seed, overlap=config.world.overlap)
        by_prompt = {prompt.id: (prompt, tuple(ranked)) for prompt, ranked in zip(prompts, shown, strict=True)}
        write_comparisons(file, [ComparisonGroup(*by_prompt[one.prompt_id], one) for one in judged])
        stage.finish({"comparisons": len(judged)})
    return load_comparisons(file).records
