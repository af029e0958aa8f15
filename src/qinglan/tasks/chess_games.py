"""Games of chess in plain move text for the pretraining corpus, by players good and bad, made with the `chess` library.

Four kinds of document: whole games, games cut at a mate in one or two, games followed by the board they led to, and
boards followed by moves (a board named in words is also how a real puzzle without its game is shown). Notation and
rules: `chess_rules.py`. A position whose hash is held out never comes to its mate here, see `is_held_out`.
"""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from qinglan.tasks import chess_rules as rules
from qinglan.tasks.document import GIVEN, Document, Span
from qinglan.tasks.item import Draw

if TYPE_CHECKING:
    import chess

MAX_PLIES = 64
"""Half-moves of a game: with two to three tokens each they fit the base models' context of 256."""
MATED_PLIES = 44
"""Half-moves of a game that is to end in mate; many end sooner."""
SHORT_PLIES = 36
"""Half-moves of a game that leave room for a board in words after them."""
KEY_MOVE = 3.0
"""Loss weight of a mating move."""
IN_ONE, IN_TWO = "Mate in one:", "Mate in two:"
VALUES = (0, 1, 3, 3, 5, 9, 0)
"""Of pawn, knight, bishop, rook, queen and king by the library's piece numbers; number 0 is no piece."""


class Player(NamedTuple):
    """How somebody plays: probabilities of doing, at each move, what is named; otherwise a random move.

    They are tried in this order.
    """

    reckless: float
    """Moves the king or a pawn in front of it (files f and g), which gets people mated early."""
    mates: float
    """Gives mate where it is there."""
    attacks: float
    """Puts a piece, not where it is attacked, on a square from which it reaches the king or a square next to him."""
    takes: float
    """Makes the capture that wins most, if one wins anything by a one-move count."""
    careful: float
    """Does not put a piece where it is attacked."""


PLAYERS: dict[str, Player] = {
    "random": Player(reckless=0.0, mates=0.0, attacks=0.0, takes=0.0, careful=0.0),
    "greedy": Player(reckless=0.0, mates=0.3, attacks=0.0, takes=1.0, careful=0.0),
    "careful": Player(reckless=0.0, mates=0.7, attacks=0.1, takes=0.8, careful=0.9),
    "attacker": Player(reckless=0.0, mates=1.0, attacks=0.6, takes=0.6, careful=0.7),
}
HUNTER = Player(reckless=0.0, mates=1.0, attacks=0.9, takes=0.4, careful=0.7)
PREY = Player(reckless=0.6, mates=0.0, attacks=0.0, takes=0.1, careful=0.0)
"""The two sides of games that are to end in mate."""

OPENINGS = (
    "e4 e5 Nf3 Nc6 Bb5 a6 Ba4 Nf6 O-O Be7",
    "e4 e5 Nf3 Nc6 Bc4 Bc5 c3 Nf6 d3 d6",
    "e4 e5 Nf3 Nc6 Bc4 Nf6 Ng5 d5 exd5 Na5",
    "e4 e5 Nf3 Nc6 d4 exd4 Nxd4 Nf6 Nc3 Bb4",
    "e4 e5 Nf3 Nf6 Nxe5 d6 Nf3 Nxe4 d4 d5",
    "e4 e5 Nf3 d6 d4 exd4 Nxd4 Nf6 Nc3 Be7",
    "e4 e5 Nc3 Nf6 f4 d5 fxe5 Nxe4 Nf3 Be7",
    "e4 e5 f4 exf4 Nf3 g5 Bc4 Bg7 d4 d6",
    "e4 e5 Bc4 Nf6 d3 c6 Nf3 d5 Bb3 Bd6",
    "e4 e5 Qh5 Nc6 Bc4 g6 Qf3 Nf6 Ne2 Bg7",
    "e4 c5 Nf3 d6 d4 cxd4 Nxd4 Nf6 Nc3 a6",
    "e4 c5 Nf3 Nc6 d4 cxd4 Nxd4 g6 Nc3 Bg7",
    "e4 c5 Nc3 Nc6 g3 g6 Bg2 Bg7 d3 d6",
    "e4 e6 d4 d5 Nc3 Nf6 Bg5 Be7 e5 Nfd7",
    "e4 e6 d4 d5 e5 c5 c3 Nc6 Nf3 Qb6",
    "e4 c6 d4 d5 Nc3 dxe4 Nxe4 Bf5 Ng3 Bg6",
    "e4 c6 d4 d5 e5 Bf5 Nf3 e6 Be2 c5",
    "e4 d5 exd5 Qxd5 Nc3 Qa5 d4 Nf6 Nf3 Bf5",
    "e4 Nf6 e5 Nd5 d4 d6 Nf3 Bg4 Be2 e6",
    "e4 d6 d4 Nf6 Nc3 g6 f4 Bg7 Nf3 O-O",
    "e4 g6 d4 Bg7 Nc3 d6 Be3 a6 Qd2 b5",
    "d4 d5 c4 e6 Nc3 Nf6 Bg5 Be7 e3 O-O",
    "d4 d5 c4 c6 Nf3 Nf6 Nc3 dxc4 a4 Bf5",
    "d4 d5 c4 dxc4 Nf3 Nf6 e3 e6 Bxc4 c5",
    "d4 d5 Bf4 Nf6 e3 c5 c3 Nc6 Nd2 e6",
    "d4 d5 e3 Nf6 Bd3 c5 c3 Nc6 f4 Bg4",
    "d4 Nf6 c4 g6 Nc3 Bg7 e4 d6 Nf3 O-O",
    "d4 Nf6 c4 e6 Nc3 Bb4 e3 O-O Bd3 d5",
    "d4 Nf6 c4 e6 Nf3 b6 g3 Bb7 Bg2 Be7",
    "d4 Nf6 c4 c5 d5 e6 Nc3 exd5 cxd5 d6",
    "d4 f5 g3 Nf6 Bg2 e6 Nf3 Be7 O-O O-O",
    "c4 e5 Nc3 Nf6 Nf3 Nc6 g3 d5 cxd5 Nxd5",
    "c4 c5 Nf3 Nf6 Nc3 Nc6 g3 g6 Bg2 Bg7",
    "Nf3 d5 g3 Nf6 Bg2 c6 O-O Bg4 d3 Nbd7",
    "b3 e5 Bb2 Nc6 e3 Nf6 Bb5 d6 Ne2 Bd7",
    "f4 d5 Nf3 g6 e3 Bg7 Be2 Nf6 O-O O-O",
)
"""Known openings; games follow one for some moves, then its players are on their own."""


class Game(NamedTuple):
    """A game from the start position."""

    moves: "tuple[chess.Move, ...]"
    result: str
    """"1-0" or "0-1" after mate, "1/2-1/2" after stalemate, "*" where it was broken off."""

    @property
    def is_mate(self) -> bool:
        """True if the last move mated."""
        return self.result in ("1-0", "0-1")

    def board(self, num_plies: int) -> "chess.Board":
        """Return the board after that many half-moves, without its history."""
        board: chess.Board = rules.chess_library().Board()
        for move in self.moves[:num_plies]:
            board.push(move)
        return board.copy(stack=False)

    def texts(self) -> list[str]:
        """Write the moves."""
        board: chess.Board = rules.chess_library().Board()
        return [board.san_and_push(move) for move in self.moves]


@lru_cache(maxsize=1)
def opening_moves() -> "tuple[tuple[chess.Move, ...], ...]":
    """Return the openings as moves."""
    chess = rules.chess_library()
    lines = []
    for line in OPENINGS:
        board = chess.Board()
        lines.append(tuple(board.push_san(text) for text in line.split()))
    return tuple(lines)


def choose_move(board: "chess.Board", player: Player, rng: random.Random) -> "chess.Move | None":
    """Return the player's move, or None in a position that has none."""
    chess = rules.chess_library()
    if player.reckless and rng.random() < player.reckless:
        own = board.occupied_co[board.turn]
        in_front = board.kings | board.pawns & (chess.BB_FILE_F | chess.BB_FILE_G)
        if moves := list(board.generate_legal_moves(own & in_front)):
            return rng.choice(moves)
    if player.mates and rng.random() < player.mates and (moves := rules.mating_moves(board)):
        return rng.choice(moves)
    if player.attacks and rng.random() < player.attacks and (move := _first_safe(board, attacking_moves(board), rng)):
        return move
    if player.takes and rng.random() < player.takes and (move := best_capture(board, rng)):
        return move
    moves = rules.legal_moves(board)
    if player.careful and rng.random() < player.careful and (move := _first_safe(board, moves, rng)):
        return move
    return rng.choice(moves) if moves else None


def attacking_moves(board: "chess.Board") -> "list[chess.Move]":
    """Return the moves of pieces to squares from which they reach the other king or a square next to him."""
    chess = rules.chess_library()
    king, own = board.king(not board.turn), board.occupied_co[board.turn]
    zone = chess.BB_KING_ATTACKS[king] | chess.BB_SQUARES[king]
    found = []
    for move in board.generate_legal_moves(own & ~board.pawns & ~board.kings):
        origin, to = chess.BB_SQUARES[move.from_square], move.to_square
        reach = 0
        if origin & board.knights:
            reach |= chess.BB_KNIGHT_ATTACKS[to]
        if origin & (board.queens | board.bishops):
            reach |= chess.BB_DIAG_ATTACKS[to][chess.BB_DIAG_MASKS[to] & board.occupied]
        if origin & (board.queens | board.rooks):
            reach |= chess.BB_RANK_ATTACKS[to][chess.BB_RANK_MASKS[to] & board.occupied]
            reach |= chess.BB_FILE_ATTACKS[to][chess.BB_FILE_MASKS[to] & board.occupied]
        if reach & zone:
            found.append(move)
    return found


def _first_safe(board: "chess.Board", moves: "list[chess.Move]", rng: random.Random) -> "chess.Move | None":
    """Return, of four of the moves drawn at random, the first that ends where the other side does not attack."""
    for move in rng.sample(moves, min(4, len(moves))):
        if not board.is_attacked_by(not board.turn, move.to_square):
            return move
    return None


def best_capture(board: "chess.Board", rng: random.Random) -> "chess.Move | None":
    """Return the capture with the largest gain above 0: what is taken, less what takes if the square is defended."""
    best: list[chess.Move] = []
    most = 0
    for move in board.generate_legal_captures():
        gain = VALUES[board.piece_type_at(move.to_square) or 1]  # en passant takes a pawn from an empty square
        if board.is_attacked_by(not board.turn, move.to_square):
            gain -= VALUES[board.piece_type_at(move.from_square) or 0]
        if gain > most:
            best, most = [move], gain
        elif best and gain == most:
            best.append(move)
    return rng.choice(best) if best else None


def play_game(
    rng: random.Random,
    players: tuple[Player, Player],
    *,
    max_plies: int = MAX_PLIES,
    held_out: bool = False,
) -> Game:
    """Play a game: a known opening for some moves (in three games of four), then each player's own moves.

    Args:
        rng: draws everything.
        players: White and Black.
        max_plies: the game is broken off there.
        held_out: False lets no game come to a mate from a held-out position, or from one that was held out two moves
            before; another move is made there. True lets all games end.
    """
    board: chess.Board = rules.chess_library().Board()
    opening: tuple[chess.Move, ...] = ()
    if rng.random() < 0.75:
        opening = rng.choice(opening_moves())
        opening = opening[: rng.randrange(1, len(opening) + 1)]
    for ply in range(max_plies):
        if ply < len(opening):
            board.push(opening[ply])
            continue
        move = choose_move(board, players[0] if board.turn else players[1], rng)
        if move is None:
            return Game(tuple(board.move_stack), "1/2-1/2")
        board.push(move)
        if board.is_checkmate() and not held_out and _gives_away(board):
            board.pop()
            mates = rules.mating_moves(board)
            others = [move for move in rules.legal_moves(board) if move not in mates]
            if not others:
                break
            board.push(rng.choice(others))
        if board.is_checkmate():
            return Game(tuple(board.move_stack), "0-1" if board.turn else "1-0")
    return Game(tuple(board.move_stack), "*")


def _gives_away(board: "chess.Board") -> bool:
    """True if the mate on the board came from a held-out position, as a mate in one or in two."""
    before = board.copy()
    before.pop()
    if rules.is_held_out(before):
        return True
    if len(before.move_stack) < 2:
        return False
    before.pop()
    before.pop()
    return rules.is_held_out(before)


def random_game(rng: random.Random, *, max_plies: int = MAX_PLIES, held_out: bool = False) -> Game:
    """Play a game of two players of any strength."""
    names = sorted(PLAYERS)
    players = PLAYERS[rng.choice(names)], PLAYERS[rng.choice(names)]
    return play_game(rng, players, max_plies=max_plies, held_out=held_out)


def mated_game(rng: random.Random, *, max_plies: int = MATED_PLIES, held_out: bool = False) -> Game:
    """Play games of at most `max_plies` half-moves until one ends in mate; nearly always the hunter mates."""
    while True:
        players = (HUNTER, PREY) if rng.random() < 0.5 else (PREY, HUNTER)
        game = play_game(rng, players, max_plies=max_plies, held_out=held_out)
        if game.is_mate:
            return game


# -------------------------------------------------------------------------------------------------------- documents


def game_text(texts: Sequence[str]) -> str:
    """Return the beginning of a document about a game: its moves so far."""
    return " ".join(("Chess:", *texts))


def board_text(board: "chess.Board") -> str:
    """Return the beginning of a document about a position without its game."""
    return f"Board: {rules.board_words(board)}. {rules.side_to_move(board)} to move:"


def chess_game(draw: Draw) -> Document:
    """A whole game with its result."""
    game = random_game(draw.rng, held_out=draw.held_out)
    return [Span(f"{game_text(game.texts())} {game.result}")]


def chess_mate(draw: Draw) -> Document:
    """A game that ends in mate; in most, mate in one is announced, or in two where it is forced."""
    game = mated_game(draw.rng, held_out=draw.held_out)
    texts, announced = game.texts(), _announced(game)
    return [Span(game_text(texts[:announced])), *_mate(texts[announced:], game.result, draw.rng)]


def _announced(game: Game) -> int:
    """Return after how many half-moves the mate is announced: three before the end where it is forced, or one."""
    three_before = len(game.moves) - 3
    if three_before >= 0:
        board = game.board(three_before)
        if board.gives_check(game.moves[-3]) and rules.mates_in_two(board, game.moves[-3]):
            return three_before
    return len(game.moves) - 1


def _mate(last_moves: Sequence[str], result: str, rng: random.Random) -> Document:
    """Return the announcement (in four documents of five), the one or three last moves, and the result."""
    mark = [Span(IN_ONE if len(last_moves) == 1 else IN_TWO)] if rng.random() < 0.8 else []
    return [*mark, Span(" ".join(last_moves), KEY_MOVE), Span(result)]


def chess_board(draw: Draw) -> Document:
    """A beginning of a game, then the board that it led to, in words; in a third, then the mate that is there."""
    if draw.rng.random() < 0.33:
        game = mated_game(draw.rng, max_plies=SHORT_PLIES, held_out=draw.held_out)
        texts, announced = game.texts(), _announced(game)
        beginning = [Span(game_text(texts[:announced]), GIVEN), Span(board_text(game.board(announced)))]
        return [*beginning, *_mate(texts[announced:], game.result, draw.rng)]
    game = random_game(draw.rng, max_plies=draw.rng.randrange(2, SHORT_PLIES), held_out=draw.held_out)
    return [Span(game_text(game.texts()), GIVEN), Span(f"Board: {rules.board_words(game.board(len(game.moves)))}.")]


def chess_position(draw: Draw) -> Document:
    """A board in words, then the moves from there: to the mate that is there, or some moves of any game."""
    rng = draw.rng
    if rng.random() < 0.5:
        game = mated_game(rng, held_out=draw.held_out)
        announced = _announced(game)
        mate = _mate(game.texts()[announced:], game.result, rng)
        return [Span(board_text(game.board(announced)), GIVEN), *mate]
    game = random_game(rng, held_out=draw.held_out)
    start = rng.randrange(4, max(5, len(game.moves) - 2))
    return [Span(board_text(game.board(start)), GIVEN), Span(" ".join(game.texts()[start : start + 24]))]


CHESS_MIX: dict[str, tuple[float, Callable[[Draw], Document]]] = {
    "chess_game": (0.35, chess_game),
    "chess_mate": (0.30, chess_mate),
    "chess_board": (0.15, chess_board),
    "chess_position": (0.20, chess_position),
}
"""Every kind of chess document with its share among them. Drawing one needs the extra `chess`, and says so without it;
who makes a corpus without chess leaves this mix out."""
