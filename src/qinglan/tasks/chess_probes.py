"""Capability probes of chess: is the next move legal, and is the mate found. They need the extra `chess`."""

from collections.abc import Callable

from qinglan.tasks import chess_rules as rules
from qinglan.tasks.chess_games import game_text, random_game
from qinglan.tasks.chess_puzzles import grade_puzzle, mate_in_one
from qinglan.tasks.item import Draw
from qinglan.tasks.probes import Probe


def chess_legal_moves(draw: Draw) -> Probe:
    """A game that the corpus does not hold, up to some move; the next one written must be legal."""
    game = random_game(draw.rng, max_plies=draw.rng.randrange(6, 31), held_out=True)
    while game.result != "*":
        game = random_game(draw.rng, max_plies=draw.rng.randrange(6, 31), held_out=True)
    board = game.board(len(game.moves))
    return Probe(game_text(game.texts()), lambda text: rules.read_move(board, text) is not None)


def chess_mate_in_one(draw: Draw) -> Probe:
    """A held-out position with one mating move, announced as such."""
    item = mate_in_one(Draw(draw.rng, held_out=True))
    return Probe(item.messages[-1].content, lambda text: grade_puzzle(item.key, text).is_exact)


CHESS_PROBES: dict[str, Callable[[Draw], Probe]] = {
    "chess_legal_moves": chess_legal_moves,
    "chess_mate_in_one": chess_mate_in_one,
}
"""The probes of chess, beside those of `probes.py`."""
