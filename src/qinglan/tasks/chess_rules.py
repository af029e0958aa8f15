"""What the chess tasks need of the rules: move text, boards in words, mating moves, and which positions are held out.

The rules themselves are those of the `chess` library (python-chess), an extra for its GPL licence: it is imported when
a chess task is first used, never before.

Moves are written in short algebraic notation (SAN), as in chess books: `e4`, `Nf3`, `Bxb5+`, `e8=Q`, `O-O`, `Qxf7#`. A
move is a piece's letter and file, then a rank: two tokens, so that games of a hundred half-moves fit the context.
Long algebraic notation (`Ng1f3`) says where the piece stood, but takes four tokens; after equal numbers of tokens nets
wrote legal moves as often in either, and found far more mates in the short one (`LOG.md`).
"""

import hashlib
import re
from types import ModuleType
from typing import TYPE_CHECKING

from qinglan.core.errors import InputError

if TYPE_CHECKING:
    import chess

HELD_OUT_SHARE = 5
"""One position in this many is kept for the test split."""
MOVE = re.compile(r"(?:O-O(?:-O)?|[NBRQK]?[a-h]?[1-8]?x?[a-h][1-8](?:=[NBRQ])?)[+#]?(?![\w=-])")


def chess_library() -> ModuleType:
    """Return the `chess` library. Raises `InputError` where the extra is not installed."""
    try:
        import chess
    except ImportError as error:
        raise InputError(
            "chess: the library that knows the rules is not installed; install qinglan[chess] "
            "(an extra, for its GPL licence), or leave chess out"
        ) from error
    return chess


def legal_moves(board: "chess.Board") -> "list[chess.Move]":
    """Return the legal moves in the library's order."""
    return list(board.generate_legal_moves())


def read_move(board: "chess.Board", text: str) -> "chess.Move | None":
    """Return the legal move that a text begins with, or None; what fits two pieces is no move.

    More of the from-square than necessary is accepted, and the marks "x", "+" and "#" do not matter.
    """
    found = MOVE.match(text.lstrip())
    if found is None:
        return None
    try:
        return board.parse_san(found[0])
    except ValueError:  # illegal or ambiguous
        return None


def board_words(board: "chess.Board") -> str:
    """Name every piece by letter and square, the strongest first: "white Ke1 Qd1 a2; black Ke8 h7"."""
    chess = chess_library()
    sides = []
    for name, colour in (("white", chess.WHITE), ("black", chess.BLACK)):
        pieces = []
        for kind in (chess.KING, chess.QUEEN, chess.ROOK, chess.BISHOP, chess.KNIGHT, chess.PAWN):
            letter = "" if kind == chess.PAWN else chess.piece_symbol(kind).upper()
            pieces += [f"{letter}{chess.SQUARE_NAMES[square]}" for square in board.pieces(kind, colour)]
        sides.append(f"{name} {' '.join(pieces)}")
    return "; ".join(sides)


def side_to_move(board: "chess.Board") -> str:
    """Return "White" or "Black"."""
    return "White" if board.turn else "Black"


def checking_moves(board: "chess.Board") -> "list[chess.Move]":
    """Return legal moves among which are all that give check; most of them do.

    Direct checks go to a square from which such a piece attacks the king; pieces that block one of their own sliders,
    promotions, castling and en passant are taken in whole.
    """
    chess = chess_library()
    us, king = board.turn, board.king(not board.turn)
    if king is None:
        return []
    occupied, own = board.occupied, board.occupied_co[us]
    rays_r = chess.BB_RANK_ATTACKS[king][0] | chess.BB_FILE_ATTACKS[king][0]
    rays_b = chess.BB_DIAG_ATTACKS[king][0]
    rook = (
        chess.BB_RANK_ATTACKS[king][chess.BB_RANK_MASKS[king] & occupied]
        | chess.BB_FILE_ATTACKS[king][chess.BB_FILE_MASKS[king] & occupied]
    )
    bishop = chess.BB_DIAG_ATTACKS[king][chess.BB_DIAG_MASKS[king] & occupied]
    last_rank = chess.BB_RANK_8 if us else chess.BB_RANK_1
    direct = [
        (board.pawns & own, chess.BB_PAWN_ATTACKS[not us][king] | last_rank),
        (board.knights & own, chess.BB_KNIGHT_ATTACKS[king]),
        (board.bishops & own, bishop),
        (board.rooks & own, rook),
        (board.queens & own, rook | bishop),
    ]
    blockers = 0
    snipers = own & (rays_r & (board.rooks | board.queens) | rays_b & (board.bishops | board.queens))
    for sniper in chess.scan_forward(snipers):
        between = chess.between(king, sniper) & occupied
        if between and not between & (between - 1) and between & own:
            blockers |= between
    found = [move for pieces, to in direct if pieces for move in board.generate_legal_moves(pieces & ~blockers, to)]
    if blockers:
        found += board.generate_legal_moves(blockers)
    found += [move for move in board.generate_castling_moves() if board.is_legal(move)]
    if board.ep_square is not None:
        found += board.generate_legal_ep()
    return found


def mating_moves(board: "chess.Board") -> "list[chess.Move]":
    """Return every move that mates, without repetition."""
    found = []
    for move in checking_moves(board):
        board.push(move)
        if board.is_checkmate() and move not in found:
            found.append(move)
        board.pop()
    return found


def mates_in_two(board: "chess.Board", move: "chess.Move") -> bool:
    """True if every answer to the move allows a mate in one, and there is an answer."""
    board.push(move)
    answers = legal_moves(board)
    forced = bool(answers)
    for answer in answers:
        board.push(answer)
        forced = bool(mating_moves(board))
        board.pop()
        if not forced:
            break
    board.pop()
    return forced


def position_name(board: "chess.Board") -> str:
    """Name a position by where the pieces stand, who is to move, castling rights and en passant."""
    return " ".join(board.fen().split()[:4])


def is_held_out(board: "chess.Board") -> bool:
    """True for the one position in five that a hash of pieces and side to move keeps for the test split."""
    name = f"{board.board_fen()} {side_to_move(board)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % HELD_OUT_SHARE == 0
