"""InstructGPT (Ouyang et al. 2022): demonstrations -> SFT -> rankings of K completions -> reward model -> PPO, measured.

Departures from the paper, all of them settings:
1. models of 0.2M to 2M parameters on a built-in world; people are simulated, their faults printed in the report;
2. the small preset takes 1 pretraining sequence per episode (paper: 8), a larger learning rate and a larger beta;
3. the reward model is as large as the policy (paper: 6B for all sizes) and starts from the pretrained model;
4. what PPO reaches on the answer key itself, with the same settings, is shown as the ceiling.

One CPU, minutes:   qinglan quickstart            (this recipe, preset small, into runs/quickstart)
Your own model:     qinglan instruct-gpt --model DIR --demonstrations F --comparisons F --prompts F
Expected numbers with their spread stand in docs/results.md.
"""

from collections.abc import Callable
from pathlib import Path

from qinglan.cli import CommandResult, Options
from qinglan.core.device import Device, prepare_process
from qinglan.core.records import ComparisonGroup, Prompt, Scorer
from qinglan.core.rng import stream_seed
from qinglan.core.run import Run, Stage
from qinglan.data.load import load_comparisons
from qinglan.data.pools import Pools, pools_from_files
from qinglan.data.write import write_comparisons
from qinglan.evals.instruct_gpt import Outcome, headline_of, measure_all
from qinglan.evals.instruct_gpt_page import draw_page
from qinglan.evals.report import write_page
from qinglan.learn.ppo import train_ppo
from qinglan.learn.ppo_config import PPOConfig
from qinglan.learn.reward import train_reward_model
from qinglan.learn.reward_function import load_reward_function
from qinglan.learn.sft import PretrainSource, train_sft
from qinglan.models.chat import make_chat_format
from qinglan.models.generate import SamplingConfig, sample_completions
from qinglan.models.heads import as_scorer
from qinglan.models.language_model import LanguageModel, load_language_model
from qinglan.recipes.instruct_gpt_config import InstructGPTConfig
from qinglan.supervisors.simulated import make_labelers, rank_all
from qinglan.tasks.assistant import World
from qinglan.tasks.assistant_data import candidates_to_rank, quality_of, world_data
from qinglan.tasks.base_models import base_tokenizer, resolve_model
from qinglan.tasks.corpus import pretraining_sequences

__all__ = ["InstructGPTConfig", "main", "quickstart"]


def quickstart(config: InstructGPTConfig, options: Options) -> CommandResult:
    """Run the recipe on the built-in world into runs/quickstart."""
    return main(config, options._replace(out=options.out or Path("runs/quickstart")))


def main(config: InstructGPTConfig, options: Options) -> CommandResult:
    """Run the whole pipeline; stages without data are skipped and said so."""
    prepare_process()
    out, seed = options.out or Path("runs/instruct-gpt"), options.seed
    device = Device.detect(config.device)
    base = load_language_model(resolve_model(config.model), device, template=config.template)
    run = Run.open(out, config, seed=seed, recipe="instruct-gpt", resume=options.resume)

    # Data: the answer key (`world`) is None for files of one's own
    pools, world, pretrain = gather(config, run, base, seed)
    skipped = []

    # Student: the policy that PPO starts from, and its reference
    start, stage = base, run.stage("start", config.start, config.model, run.inputs, config.world)
    if pools.demonstrations:
        mix = config.start if pretrain else config.start.model_copy(update={"pretrain_fraction": 0.0})
        start = train_sft(base, pools.demonstrations, mix, stage=stage, seed=seed, pretrain=pretrain)
        stage.finish()
    else:
        skipped.append("SFT: no demonstrations; PPO starts from the base model")

    # Supervisor: labelers rank K completions of each prompt (built-in world), or the file's comparisons
    comparisons = pools.comparisons
    if world is not None:
        comparisons = ranked_completions(config, start, pools, world, run.stage("comparisons", stage, config.world), seed)

    # Learn: reward model, baseline, policy
    reward_model, scorer = None, None
    if comparisons:
        stage = run.stage("reward_model", config.reward_model, stage, [group.comparison.id for group in comparisons])
        valid, shown = pools.held_out_comparisons[:200], pools.demonstrations
        reward_model = train_reward_model(
            base, comparisons, config.reward_model, stage=stage, seed=seed, valid=valid, demonstrations=shown
        )
        stage.finish()
        scorer = as_scorer(reward_model)
    if config.reward is not None:
        scorer = load_reward_function(config.reward)
    baseline = start
    if pools.demonstrations:
        baseline_stage = run.stage("baseline", config.baseline, stage, config.reward)
        select = None if scorer is None else mean_score(scorer, pools.valid_prompts, config.sampling, seed)
        baseline = train_sft(base, pools.demonstrations, config.baseline, stage=baseline_stage, seed=seed, select=select)
        baseline_stage.finish()
    outcome = Outcome(base, start, baseline, reward_model, pools, comparisons, world, pretrain, skipped)
    if scorer is None:
        skipped.append("reward model and PPO: no comparisons and no reward function")
        return finish(run, config, outcome)
    if reward_model is None:
        skipped.append("reward model: no comparisons; PPO uses the reward function")

    def ppo(name: str, settings: PPOConfig, reward: Scorer) -> LanguageModel:
        ppo_stage = run.stage(name, settings, stage, config.reward)
        gold = world.gold() if world is not None else None
        result = train_ppo(start, start, reward, pools.rl_prompts, settings, stage=ppo_stage, seed=seed,
                           value_start=reward_model, pretrain=pretrain, gold=gold)  # fmt: skip
        ppo_stage.finish({"alarms": result.alarms})
        return result.policy

    settings = config.ppo if pretrain else config.ppo.model_copy(update={"ptx_coef": 0.0})
    outcome = outcome._replace(policy=ppo("ppo", settings, scorer), scorer=scorer)
    if world is not None and config.compare_without_ptx and settings.ptx_coef > 0:
        outcome = outcome._replace(without_ptx=ppo("ppo_without_ptx", settings.model_copy(update={"ptx_coef": 0.0}), scorer))
    if world is not None and config.train_ceiling:
        outcome = outcome._replace(ceiling=ppo("ppo_ceiling", settings, world.gold(scale=TRUTH_SCALE)))
    if config.larger_model is not None and world is not None:
        outcome = outcome._replace(larger=load_language_model(resolve_model(config.larger_model), device))

    # Measure: held-out users, entities and wordings; held-out labelers
    return finish(run, config, outcome)


TRUTH_SCALE = 5.0
"""The ceiling's reward: the gold score in [0, 1] times this, about the spread of a reward model's logits."""


def gather(config: InstructGPTConfig, run: Run, base: LanguageModel, seed: int) -> tuple[Pools, World | None, PretrainSource | None]:
    """Return the prompts and feedback, and for the built-in world its answer key and pretraining corpus."""

    def num_tokens(prompt: Prompt) -> int:
        return len(base.chat.prompt_ids(prompt.messages))

    files = {"prompts": config.prompts, "demonstrations": config.demonstrations, "comparisons": config.comparisons}
    given = {name: path for name, path in files.items() if path is not None}
    if not given:
        data = world_data(config.world, config.hygiene, seed=seed, num_tokens=num_tokens)
        is_family = base.chat.render_hash == make_chat_format(base_tokenizer()).render_hash
        corpus = pretraining_sequences(base.tokenizer._tokenizer, seed, max_tokens=96) if is_family else None
        return data.pools, data.world, corpus
    for name, path in given.items():
        run.add_input(name, path)
    pools = pools_from_files(**files, config=config.hygiene, seed=seed, on_bad=config.on_bad, num_tokens=num_tokens)
    return pools, None, None


def ranked_completions(
    config: InstructGPTConfig, policy: LanguageModel, pools: Pools, world: World, stage: Stage, seed: int
) -> list[ComparisonGroup]:
    """Sample completions and let labelers rank them with ties; kept in the run as records, like people's own."""
    file = stage.dir / "comparisons.jsonl"
    if not stage.is_done:
        prompts, people = pools.comparison_prompts, make_labelers(config.world.num_labelers, config.world.labelers, seed)
        samples = sample_completions(policy, prompts, config.sampling, seed=stream_seed(seed, "to rank"), num_samples=config.world.max_ranked)
        shown = candidates_to_rank(prompts, samples, config.world, seed)
        judged = rank_all(people, prompts, shown, quality_of(world), seed=seed, overlap=config.world.overlap)
        by_prompt = {prompt.id: (prompt, tuple(ranked)) for prompt, ranked in zip(prompts, shown, strict=True)}
        write_comparisons(file, [ComparisonGroup(*by_prompt[one.prompt_id], one) for one in judged])
        stage.finish({"comparisons": len(judged)})
    return load_comparisons(file).records


def mean_score(scorer: Scorer, prompts: list[Prompt], sampling: SamplingConfig, seed: int) -> Callable[[LanguageModel], float]:
    """Return the function that scores a model by the mean score of its completions of `prompts`."""

    def select(lm: LanguageModel) -> float:
        drawn = [row[0] for row in sample_completions(lm, prompts, sampling, seed=stream_seed(seed, "select"))]
        return sum(scorer(prompts, drawn)) / len(drawn)

    return select


def finish(run: Run, config: InstructGPTConfig, outcome: Outcome) -> CommandResult:
    """Measure, write report.json and report.html, and return the headline."""
    report, found = measure_all(run, outcome, config.world, config.sampling, config.measure)
    write_page(run.dir / "report.html", draw_page(run, report, outcome, found, config.world))
    return CommandResult(f"{headline_of(report)}\n{run.dir / 'report.html'}", report.to_json())
