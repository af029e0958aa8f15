"""Write the tables of docs/benchmarks.md from results/*.json: `python -m benchmarks.page`.

A table whose results are missing stays as it is.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, TUNING

PAGE = ROOT / "docs" / "benchmarks.md"
JOBS = ("reward", "sampling", "rloo", "ppo", "sft")


def read(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def ratio(found: dict[str, float]) -> str:
    """Return a ratio with its interval."""
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


OTHERS = {
    "ratio_to_peer_defaults": "with the peer's defaults",
    "ratio_to_peer_with_onednn": "with the peer's products by oneDNN too",
}
"""Ratios to the peer set otherwise, with the heads of their columns, which are there if one row has such a ratio."""


def results_table() -> str:
    """Return one row for each job and setting."""
    paths = {job: RESULTS / f"{job}.json" for job in JOBS}
    found = {job: read(path)["by_setting"] for job, path in paths.items() if path.is_file()}
    shown = [key for key in OTHERS if any(key in one for rows in found.values() for one in rows.values())]
    heads = "".join(f" {OTHERS[key]} |" for key in shown)
    lines = [
        "| job | model | products | threads | ours / peer, wall clock | by CPU time "
        f"|{heads} ours | peer | unit | memory | must, aim |",
        f"|---|---|---|---:|---:|---:|{'---:|' * len(shown)}---:|---:|---|---:|---|",
    ]
    for job, rows in found.items():
        module = importlib.import_module(f"benchmarks.{job}")
        for name, one in rows.items():
            settings = one.get("settings", {"model": name, "dtype": "float32"})
            others = "".join(f" {ratio(one[key]['cpu_ratio']) if key in one else ''} |" for key in shown)
            products = "; ".join([settings["dtype"], *([one["note"]] if "note" in one else [])])
            lines.append(
                f"| {job} | {settings['model']} | {products} | {settings.get('threads', 1)} | {ratio(one['ratio'])} "
                f"| {ratio(one['cpu_ratio'])} |{others} "
                f"{one['ours']['median']:.4g} | {one['peer']['median']:.4g} | {module.UNIT} "
                f"| {one['memory_ratio']:.2f} | {module.MUST_REACH:g}x, {module.AIM:g}x |"
            )
    return "\n".join(lines)


def tried_table() -> str:
    """Return what each side tried, with the units per CPU second of one run."""
    lines = ["| job, setting | side | settings | units per CPU second |", "|---|---|---|---:|"]
    for job in JOBS:
        for path in sorted(TUNING.glob(f"{job}-*.json")):
            tuned = read(path)
            for side in ("ours", "peer"):
                for one in tuned.get(side, {}).get("tried", []):
                    rate = f"{one['cpu_rate']:.4g}" if "cpu_rate" in one else one["failed"].replace("|", "/")
                    chosen = " (chosen)" if one["options"] == tuned[side]["best"] else ""
                    other = "memory float32" if path.stem.endswith("bfloat16") else "memory bfloat16"
                    options = ", ".join(f"{name} {value}" for name, value in one["options"].items() if name != other)
                    lines.append(f"| {path.stem.replace('-', ', ')} | {side} | {options}{chosen} | {rate} |")
    return "\n".join(lines)


def limits_table() -> str:
    """Return shares of the physical limits."""
    found = read(RESULTS / "limits.json")
    limits, training = found["limits"], found["training"]
    lines = [
        "| what | wall clock | CPU time |",
        "|---|---:|---:|",
        *(
            f"| {name} | {limits[key]['wall'] / 1e9:.3g} | {limits[key]['cpu'] / 1e9:.3g} |"
            for name, key in (
                ("fp32 products of 1,024 x 1,024 by oneDNN, GFLOP/s", "fp32_flops"),
                ("the same by MKL, PyTorch's default", "fp32_mkl_flops"),
                ("bf16 products, GFLOP/s", "bf16_flops"),
                ("memory copied, GB/s", "copied_bytes"),
            )
        ),
        f"| training, share of fp32 products | {training['share_of_fp32']['wall']:.2f} "
        f"| {training['share_of_fp32']['cpu']:.2f} |",
    ]
    for one in found["decoding"]:
        for name, key in (("copying", "share_of_copying"), ("fp32 products", "share_of_fp32")):
            lines.append(
                f"| decoding {one['rows']} rows, share of {name} | {one[key]['wall']:.2f} | {one[key]['cpu']:.2f} |"
            )
    return "\n".join(lines)


def attention_table() -> str:
    """Return milliseconds of attention by length."""
    names = [f"{way}_{precision}" for precision in ("fp32", "bf16") for way in ("fused", "products", "kernel")]
    lines = [
        "| rows x tokens | PyTorch's kernel, fp32 | products, fp32 | ours, fp32 "
        "| PyTorch's kernel, bf16 | products, bf16 | ours, bf16 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in read(RESULTS / "attention.json")["rows"]:
        values = " | ".join(f"{one[name]:.1f}" for name in names)
        lines.append(f"| {one['rows']} x {one['tokens']:,} | {values} |")
    return "\n".join(lines)


def growth_table() -> str:
    """Return CPU seconds at 1, 2, 4 and 8 times the work."""
    lines = ["| what grows | 1x | 2x | 4x | 8x | exponents |", "|---|---:|---:|---:|---:|---|"]
    for name, one in read(RESULTS / "growth.json")["axes"].items():
        seconds = " | ".join(f"{step['cpu']:.3f}" for step in one["seconds"])
        exponents = ", ".join(f"{value:.2f}" for value in one["exponents_by_cpu"])
        lines.append(f"| {name} | {seconds} | {exponents} |")
    return "\n".join(lines)


def gpu_table() -> str:
    """Return what a GPU reached: updates of pretraining, and larger models in sampling, fine-tuning and PPO."""
    found = read(RESULTS / "gpu.json")
    limits, drawn, tuned = found["limits"], found["sampling"], found["fine_tuning"]
    lines = [
        f"{limits['device']}, torch {limits['torch']}: products in bf16 {limits['bf16_flops'] / 1e12:.0f} TFLOP/s, "
        f"in fp32 {limits['fp32_flops'] / 1e12:.0f}, copying {limits['copied_bytes'] / 1e12:.2f} TB/s.",
        "",
        "| pretraining, one update | as it is, ms | CUDA graphs, ms | tokens per second | weights differ by |",
        "|---|---:|---:|---:|---:|",
    ]
    for size, one in found["pretraining"].items():
        if isinstance(one, dict):
            lines.append(
                f"| {size} | {one['plain_ms']:.1f} | {one['graph_ms']:.1f} | {one['tokens_per_second']:,.0f} "
                f"| {one['relative_difference_after_8_updates']:g} |"
            )
    for size, one in found.get("pretraining_compiled", {}).items():
        if isinstance(one, dict):
            rates = f"{one['best']:,.0f} at best, {one['median']:,.0f} in the median"
            lines.append(f"| {size}, compiled, {one['batch_tokens']:,} tokens | | | {rates} | |")
    lines += ["", "| job | side | rate |", "|---|---|---:|"]
    for side, name in (("graphs", "ours"), ("plain", "ours, no graphs"), ("transformers", "transformers generate")):
        lines.append(f"| sampling | {name} | {drawn[side]['tokens_per_second']:,.0f} tokens/s |")
    for side, name in (("packed", "ours, packed"), ("padded", "ours, padded"), ("plain_loop", "plain padded loop")):
        one = tuned[side]
        speed = f", {one['flops'] / 1e12:.0f} TFLOP/s" if "flops" in one else ""
        lines.append(f"| fine-tuning | {name} | {one['tokens_per_second']:,.0f} tokens/s{speed} |")
    for estimator in ("gae", "rloo"):
        one = found["ppo"][estimator]
        last = one["last_line"]
        lines.append(
            f"| PPO, {estimator} | ours | {one['episodes_per_second']:.0f} episodes/s with start and saving; "
            f"last iteration {last['seconds']:.2f} s, of which sampling {last['seconds_sampling']:.2f} |"
        )
    return "\n".join(lines)


TABLES = {
    "gpu": gpu_table,
    "results": results_table,
    "tried": tried_table,
    "limits": limits_table,
    "attention": attention_table,
    "growth": growth_table,
}
NEEDED = {name: RESULTS / f"{name}.json" for name in ("limits", "attention", "growth", "gpu")}


def main() -> None:
    """Put every table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        if name in NEEDED and not NEEDED[name].is_file():
            continue
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        content = f"{marks[0]}\n{table()}\n{marks[1]}"
        text = pattern.sub(lambda match, content=content: content, text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
