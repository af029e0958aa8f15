"""The one tokenizer of the base family: byte-level BPE with single digits, trained on the corpus; its chat template.

Every stretch of text begins with a space, so that a word is one and the same token wherever it stands.
Made by `python -m qinglan.tasks.tokenizer`; the files lie beside this module.
"""

import random
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qinglan.core.rng import stream_seed
from qinglan.tasks.corpus import MIX, make_document
from qinglan.tasks.document import ASSISTANT, BOS, EOS, USER

PAD, SYSTEM = "<|pad|>", "<|system|>"
VOCABULARY = 2304
TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content }}<|eos|>{% endgeneration %}"
    "{% else %}<|{{ message.role }}|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(num_documents: int, seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `num_documents` documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Split(Regex(r"\d"), "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (PAD, BOS, EOS, USER, ASSISTANT, SYSTEM)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=3,
    )
    marks = "|".join(re.escape(str(token.content)) for token in special)

    def texts() -> list[str]:
        made = []
        for number in range(num_documents):
            document = make_document(random.Random(stream_seed(seed, "tokenizer", number)), mix=MIX)
            text = " ".join(span.text for span in document)
            made += re.split(marks, text)  # line feeds stay: a program's line breaks and indentation become tokens
        return made

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


if __name__ == "__main__":
    train_tokenizer(30_000, seed=0).save_pretrained(TOKENIZER_DIR)
