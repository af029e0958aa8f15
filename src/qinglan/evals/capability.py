"""What a base model can do: rates of every probe of the built-in world (`tasks/probes.py`), decoded greedily."""

from qinglan.core.run import Measure
from qinglan.evals.metrics import mean_with_interval
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import LanguageModel
from qinglan.tasks.probes import PROBES, draw_probes


def probe_capabilities(lm: LanguageModel, *, num_items: int = 200, seed: int = 0) -> dict[str, Measure]:
    """Return the pass rate of every probe with its 95% interval."""
    bos = lm.tokenizer.bos_token_id
    measures = {}
    for name in PROBES:
        probes = draw_probes(name, num_items, seed)
        config = SamplingConfig(temperature=0.0, max_new_tokens=max(probe.max_new_tokens for probe in probes))
        prompts = [[bos, *lm.tokenizer(probe.beginning, add_special_tokens=False).input_ids] for probe in probes]
        samples = generate(lm, prompts, config, seed=seed)
        passed = [float(probe.passes(row[0].text)) for probe, row in zip(probes, samples, strict=True)]
        measures[name] = mean_with_interval(passed, seed=seed, unit="rate")
    return measures
