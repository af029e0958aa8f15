"""Best-move puzzles with one answer: mate in one and in two from seeded play, and real ones from the Lichess file.

Weak-to-strong generalization, section on chess: the prompt is the game so far, the answer the best move as text, judged
by exact match. A hash of the position gives a puzzle to training or, one in five, to the test; the corpus never shows a
held-out position coming to its mate (`chess_games.play_game`), so that no answer of the test was ever read. Lichess
publishes positions without their games, and these puzzles name the board in words instead.
"""

import csv
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from qinglan.core.errors import InputError
from qinglan.core.rng import stream_seed
from qinglan.tasks import chess_rules as rules
from qinglan.tasks.chess_games import (
    HUNTER,
    IN_ONE,
    IN_TWO,
    MATED_PLIES,
    PREY,
    board_text,
    game_text,
    play_game,
)
from qinglan.tasks.item import Draw, Item, Key, user

if TYPE_CHECKING:
    import chess

Kind = Literal["mate_in_one", "mate_in_two"]
ANNOUNCED: dict[str, str] = {"mate_in_one": IN_ONE, "mate_in_two": IN_TWO}
LICHESS_COLUMNS = ("PuzzleId", "FEN", "Moves", "Rating", "Themes")
LICHESS_THEMES = {"mateIn1": "mate_in_one", "mateIn2": "mate_in_two"}


# ------------------------------------------------------------------------------------------------------ seeded play


def mate_in_one(draw: Draw) -> Item:
    """A game up to a position with exactly one mating move."""
    return _puzzle(draw, "mate_in_one")


def mate_in_two(draw: Draw) -> Item:
    """A game up to a position without mate in one where exactly one move, a check, mates in two against any answer."""
    return _puzzle(draw, "mate_in_two")


def draw_puzzles(kind: Kind, count: int, seed: int, split: Literal["train", "test"]) -> list[Item]:
    """Return `count` puzzles of different positions, the same for the same seed; the splits share no position."""
    rng = random.Random(stream_seed(seed, "chess puzzles", kind, split))
    found: dict[str, Item] = {}
    while len(found) < count:
        item = _puzzle(Draw(rng, held_out=split == "test"), kind)
        found.setdefault(item.key["position"], item)
    return list(found.values())


def _puzzle(draw: Draw, kind: Kind) -> Item:
    """Play games until one passes a position of the wanted kind and split.

    The attacker overlooks mates, so that games go on and pass several.
    """
    hunter = HUNTER._replace(mates=0.0)
    solve = only_mate_in_one if kind == "mate_in_one" else only_mate_in_two
    while True:
        hunter_is_white = draw.rng.random() < 0.5
        players = (hunter, PREY) if hunter_is_white else (PREY, hunter)
        game = play_game(draw.rng, players, max_plies=MATED_PLIES, held_out=True)
        board = game.board(0)
        for ply, move in enumerate(game.moves):
            if board.turn == hunter_is_white and (answer := solve(board)) and rules.is_held_out(board) == draw.held_out:
                return _item(board, answer, f"{game_text(game.texts()[:ply])} {ANNOUNCED[kind]}", kind, draw.rng)
            board.push(move)


def only_mate_in_one(board: "chess.Board") -> "chess.Move | None":
    """Return the only mating move of a position, or None where there are several or none."""
    moves = rules.mating_moves(board)
    return moves[0] if len(moves) == 1 else None


def only_mate_in_two(board: "chess.Board") -> "chess.Move | None":
    """Return the only move that forces mate in two, if it gives check and nothing mates at once; else None."""
    checks = rules.checking_moves(board)
    found = next((move for move in checks if board.gives_check(move) and rules.mates_in_two(board, move)), None)
    if found is None or rules.mating_moves(board):
        return None
    others = [move for move in rules.legal_moves(board) if move != found]
    return None if any(rules.mates_in_two(board, move) for move in others) else found


def _item(board: "chess.Board", answer: "chess.Move", text: str, kind: str, rng: random.Random) -> Item:
    others = [move for move in rules.legal_moves(board) if move != answer]
    wrong = {"wrong": board.san(rng.choice(others))} if others else {}
    right, position = board.san(answer), rules.position_name(board)
    key: Key = {"fen": board.fen(), "answer": right, "kind": kind, "position": position}
    return Item("chess", ("chess", kind), (user(text),), key, (right,), wrong)


# ---------------------------------------------------------------------------------------------------------- grading


class Solution(NamedTuple):
    """What the answer key says of a completion."""

    is_exact: bool
    """The first move is the answer; marks of capture, check and mate do not count."""
    is_solved: bool
    """It is the answer, or another move that mates at once."""
    is_legal: bool


def grade_puzzle(key: Key, text: str) -> Solution:
    """Judge the first move of a completion."""
    board = rules.chess_library().Board(key["fen"])
    move = rules.read_move(board, text)
    if move is None:
        return Solution(False, False, False)
    is_exact = move == rules.read_move(board, key["answer"])
    return Solution(is_exact, is_exact or move in rules.mating_moves(board), True)


# ---------------------------------------------------------------------------------------------------------- Lichess


def load_lichess_puzzles(path: str | Path) -> list[Item]:
    """Load puzzles from a CSV file with the columns of the Lichess puzzle database.

    The first move of `Moves` is the opponent's; it is made on the board, and the second is the answer. The board is
    named in words (castling rights and en passant are not said) and a mate in one or two is announced where `Themes`
    names it, as in the documents of the corpus. Key: also `id` and `rating`.

    Raises:
        InputError: no such file, a missing column, a position or move that is none, with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a CSV file with the columns {', '.join(LICHESS_COLUMNS)}")
    items = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in LICHESS_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path}: has no column {', '.join(missing)}; expected {', '.join(LICHESS_COLUMNS)}")
        for row in reader:
            try:
                items.append(_lichess_item(row))
            except (ValueError, TypeError, AttributeError) as error:  # a short row has None for its last columns
                raise InputError(
                    f"{path}:{reader.line_num}: {error}; expected a FEN position, at least two legal moves in "
                    f"coordinates, and a whole number as rating"
                ) from error
    return items


def _lichess_item(row: dict[str, str]) -> Item:
    chess = rules.chess_library()
    board = chess.Board(row["FEN"])
    if not board.is_valid():
        raise ValueError(f"no legal position: {row['FEN']}")
    moves = row["Moves"].split()
    if len(moves) < 2:
        raise ValueError(f"{len(moves)} moves in {row['Moves']!r}")
    board.push(board.parse_uci(moves[0]))
    answer = board.parse_uci(moves[1])
    kind = next((kind for theme, kind in LICHESS_THEMES.items() if theme in row["Themes"].split()), "best_move")
    text = " ".join(filter(None, (board_text(board), ANNOUNCED.get(kind))))
    rng = random.Random(stream_seed(0, "lichess", row["PuzzleId"]))  # draws the wrong move beside the answer
    item = _item(board, answer, text, kind, rng)
    tags = (*item.tags, "lichess", *row["Themes"].split())
    return item._replace(tags=tags, key={**item.key, "id": row["PuzzleId"], "rating": int(row["Rating"])})
