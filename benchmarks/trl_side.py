"""What the peers' side of several jobs needs: model, tokenizer, and training arguments without any extra work.

Gradient checkpointing is off unless a job asks for the peer's defaults, saving and reports are always off.
"""

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.workloads import Workload


def tokenizer_of(work: Workload) -> Any:
    """Return the workload's tokenizer, whatever the version of transformers."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work.model_dir / "tokenizer.json"),
        eos_token=work.tokens["eos_token"],
        pad_token=work.tokens["pad_token"],
        padding_side="left",
    )
    template = work.model_dir / "chat_template.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    return tokenizer


def causal_model(work: Workload) -> Any:
    """Return the workload's model in fp32."""
    return AutoModelForCausalLM.from_pretrained(work.model_dir, dtype=torch.float32)


def scalar_model(work: Workload) -> Any:
    """Return the workload's trunk with a scalar head."""
    model = AutoModelForSequenceClassification.from_pretrained(work.model_dir, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = work.tokens["pad_id"]
    return model


def arguments(**changes: Any) -> dict[str, Any]:
    """Return training arguments that do nothing but train."""
    common = {
        "output_dir": tempfile.mkdtemp(prefix="bench-"),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1_000_000,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-6,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
    }
    return common | changes
