"""The sampler: one engine for rollouts, K samples, best-of-n, search and chat, for any Hugging Face causal LM.

Continuous batching: each prompt is prefilled once and its keys and values are copied to its K samples; every step feeds one
token to each live row; finished rows leave at once, and free slots are refilled from the queue. A row draws from its own
stream of uniform numbers, named by (seed, key, sample index), and carries its own length, so that its tokens do not depend
on batch size, order or neighbours (up to the rounding of matrix products, about 1e-6 in a logit). The log-probability of
each sampled token is recorded under the distribution that it was drawn from.

The last prompt token is fed by the first decoding step, not by the prefill: all logits come from one place.
`kv_cache.py` holds the memory, `sampling.py` the draw. Log-probabilities from here serve as PPO's old log-probabilities.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import Completion, FinishReason, Prompt, Sampler, record_id
from qinglan.core.rng import numpy_stream
from qinglan.core.run import Progress
from qinglan.models.language_model import LanguageModel
from qinglan.models.row_memory import RowMemory, make_row_memory
from qinglan.models.sampling import draw

Constraint = Callable[[Sequence[int]], Sequence[int] | AbstractSet[int] | None]
"""What may follow: given the completion's tokens so far, returns a sequence of token ids to force (an end id among them ends
the completion), a set of ids to sample from, or None for anything. Asked before each token that is not already forced."""
