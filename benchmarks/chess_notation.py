"""Which move text does a small net learn: long algebraic (`Ng1f3`) or short (`Nf3`)? Held-out rates after equal tokens.

A fresh base model reads chess only, in one notation, cut to the same number of tokens; the tokenizer is trained on
chess and the rest of the corpus. Then it writes moves greedily: legal in games that it has not read? The mate, where a
held-out position has one?

    python benchmarks/chess_notation.py --notation long --tokens 700000 --out /tmp/notation
"""

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import chess
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qinglan.core.device import prepare_process
from qinglan.core.rng import stream_seed
from qinglan.core.run import Run
from qinglan.evals.metrics import mean_with_interval
from qinglan.learn.pretrain import PretrainConfig, pretrain
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import LanguageModel
from qinglan.tasks import chess_rules as rules
from qinglan.tasks.base_models import base_tokenizer, build
from qinglan.tasks.chess_games import CHESS_MIX, IN_ONE, IN_TWO, game_text, random_game
from qinglan.tasks.chess_puzzles import draw_puzzles
from qinglan.tasks.corpus import document_ids, make_document
from qinglan.tasks.document import Document, Span
from qinglan.tasks.item import Draw

KINDS = ("chess_game", "chess_mate", "chess_board")
"""Kinds of document that begin with a game's first move, so that they can be rewritten."""
WORDS = {"Chess:", *IN_ONE.split(), *IN_TWO.split(), "Board:"}


def lengthen(document: Document) -> Document:
    """Rewrite the moves of a document in long algebraic notation without hyphens; a board in words stays.

    A mate after a board goes on from the moves before it.
    """
    board = chess.Board()
    return [
        span if span.text.startswith("Board:") else Span(" ".join(_long(board, w) for w in span.text.split()), span[1])
        for span in document
    ]


def _long(board: chess.Board, word: str) -> str:
    move = None if word in WORDS else rules.read_move(board, word)
    if move is None:
        return word
    text = board.lan(move).replace("-", "") if not board.is_castling(move) else board.san(move)
    board.push(move)
    return text


def keep(document: Document) -> Document:
    """Leave a document as it is."""
    return document


class Notation(NamedTuple):
    """How documents are rewritten, and how a move is read back."""

    rewrite: Callable[[Document], Document]
    read: Callable[[chess.Board, str], chess.Move | None]


LONG_MOVE = re.compile(r"(?:O-O(?:-O)?|[NBRQK]?[a-h][1-8]x?[a-h][1-8](?:=[NBRQ])?)[+#]?(?!\w)")


def read_long(board: chess.Board, text: str) -> chess.Move | None:
    """Return the legal move in long algebraic notation that a text begins with, or None."""
    found = LONG_MOVE.match(text.lstrip())
    return None if found is None else rules.read_move(board, found[0])


NOTATIONS = {"long": Notation(lengthen, read_long), "short": Notation(keep, rules.read_move)}


def chess_document(rng: random.Random, notation: str) -> Document:
    """Draw a document of the chess mix."""
    kind = rng.choices(KINDS, [CHESS_MIX[kind][0] for kind in KINDS])[0]
    return NOTATIONS[notation].rewrite(CHESS_MIX[kind][1](Draw(rng, held_out=False)))


def make_tokenizer(notation: str, num_documents: int) -> PreTrainedTokenizerBase:
    """Train the base family's kind of tokenizer, with its special tokens, one document in eight being chess."""
    texts = []
    for number in range(num_documents):
        rng = random.Random(stream_seed(0, "tokenizer", number))
        document = chess_document(rng, notation) if number % 8 == 0 else make_document(rng)
        texts.append(" ".join(span.text for span in document if "<|" not in span.text))
    return base_tokenizer().train_new_from_iterator(texts, vocab_size=2048, show_progress=False)


@dataclass(frozen=True)
class ChessBlocks:
    """Blocks of chess documents by position, as `corpus.CorpusBlocks` makes those of the whole corpus."""

    tokenizer: Tokenizer
    notation: str
    seed: int
    context: int

    def __call__(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and loss weights of blocks `start` to `start + count - 1`, both [count, context + 1]."""
        all_ids, all_weights = [], []
        for number in range(start, start + count):
            rng = random.Random(stream_seed(self.seed, "chess notation", number))
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) <= self.context:
                more, loss_weights = document_ids(self.tokenizer, chess_document(rng, self.notation))
                ids, weights = ids + more, weights + loss_weights
            all_ids.append(ids[: self.context + 1])
            all_weights.append(weights[: self.context + 1])
        return torch.tensor(all_ids), torch.tensor(all_weights)


class Case(NamedTuple):
    """A beginning, the board it leads to, and which moves pass (None: every legal one)."""

    beginning: str
    board: chess.Board
    wanted: chess.Move | None


def cases(notation: str, count: int) -> dict[str, list[Case]]:
    """Return held-out games cut anywhere, and held-out positions with one mating move."""

    def rewritten(text: str) -> str:
        return NOTATIONS[notation].rewrite([Span(text)])[0].text

    rng = random.Random(stream_seed(0, "chess notation", "held out"))
    games = [random_game(rng, max_plies=rng.randrange(6, 31), held_out=True) for _ in range(2 * count)]
    legal = [
        Case(rewritten(game_text(game.texts())), game.board(len(game.moves)), None)
        for game in [game for game in games if game.result == "*"][:count]
    ]
    mates = []
    for item in draw_puzzles("mate_in_one", count, 0, "test"):
        board = chess.Board(item.key["fen"])
        mates.append(Case(rewritten(item.messages[0].content), board, rules.read_move(board, item.key["answer"])))
    return {"legal": legal, "mate_in_one": mates}


def rates(lm: LanguageModel, notation: str, count: int) -> dict[str, str]:
    """Return the rates of legal moves (in games, and where a mate is announced) and of mates found, greedily."""
    found: dict[str, list[float]] = {}
    for name, group in cases(notation, count).items():
        starts = [[lm.tokenizer.bos_token_id, *lm.tokenizer(case.beginning).input_ids][-248:] for case in group]
        rows = generate(lm, starts, SamplingConfig(temperature=0.0, max_new_tokens=8), seed=0)
        moves = [NOTATIONS[notation].read(case.board, row[0].text) for case, row in zip(group, rows, strict=True)]
        found[f"{name}/legal"] = [float(move is not None) for move in moves]
        if name == "mate_in_one":
            found[f"{name}/found"] = [float(move == case.wanted) for move, case in zip(moves, group, strict=True)]
            found[f"{name}/random_legal_move"] = [1 / case.board.legal_moves.count() for case in group]
    return {name: str(mean_with_interval(values, seed=0, unit="rate")) for name, values in found.items()}


def main() -> None:
    """Train one model in one notation and print its rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notation", choices=sorted(NOTATIONS), default="long")
    parser.add_argument("--size", default="micro")
    parser.add_argument("--tokens", type=int, default=700_000)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    prepare_process()
    tokenizer = make_tokenizer(options.notation, 16_000)
    config = PretrainConfig(num_tokens=options.tokens, num_held_out_blocks=8, num_probes=1)
    run = Run.open(options.out or Path(tempfile.mkdtemp()), config, seed=options.seed, recipe="chess notation")
    blocks = ChessBlocks(tokenizer._tokenizer, options.notation, options.seed, config.context)
    lengths = [
        len(document_ids(blocks.tokenizer, chess_document(random.Random(n), options.notation))[0]) for n in range(200)
    ]
    start = time.perf_counter()
    fresh = build(options.size, tokenizer, options.seed)
    lm = pretrain(fresh, blocks, config, stage=run.stage("pretrain", config), seed=options.seed)
    seconds = time.perf_counter() - start
    settings = {"notation": options.notation, "size": options.size, "tokens": options.tokens, "seed": options.seed}
    measured = {"seconds": round(seconds), "tokens_per_document": sum(lengths) / len(lengths)}
    print(json.dumps({**settings, **measured, **rates(lm, options.notation, options.count)}))


if __name__ == "__main__":
    main()
