"""Chess: move text that reads back, legal games, exact mates, splits that share no mate, probes, real puzzles."""

import builtins
import os
import random
import time
from pathlib import Path

import chess
import pytest

from qinglan.core.errors import InputError
from qinglan.tasks import chess_rules as rules
from qinglan.tasks.chess_games import CHESS_MIX, OPENINGS, PLAYERS, mated_game, opening_moves, play_game, random_game
from qinglan.tasks.chess_probes import CHESS_PROBES
from qinglan.tasks.chess_puzzles import draw_puzzles, grade_puzzle, load_lichess_puzzles, only_mate_in_two
from qinglan.tasks.item import Draw


def replay(texts, board=None):
    """Make moves by their texts, each of which must be legal and must be what the rules write for it."""
    board = board or chess.Board()
    for text in texts:
        move = rules.read_move(board, text)
        assert move is not None, f"{text} in {board.fen()}"
        assert board.san_and_push(move) == text
    return board


def text_of(document):
    return " ".join(span.text for span in document)


def slow_mates(board):
    """Return the moves after which the library itself sees mate."""
    found = set()
    for move in board.legal_moves:
        after = board.copy(stack=False)
        after.push(move)
        if after.is_checkmate():
            found.add(move)
    return found


# ------------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("fen", "uci", "text"),
    [
        (chess.STARTING_FEN, "e2e4", "e4"),
        (chess.STARTING_FEN, "g1f3", "Nf3"),
        ("rnbqkbnr/ppp1pppp/8/3p4/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2", "e4d5", "exd5"),
        ("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 1", "e5d6", "exd6"),  # en passant
        ("4k3/8/8/8/8/8/8/4K2R w K - 0 1", "e1g1", "O-O"),
        ("r3k3/8/8/8/8/8/8/4K3 b q - 0 1", "e8c8", "O-O-O"),
        ("4k3/8/8/8/8/5N2/8/1N2K3 w - - 0 1", "b1d2", "Nbd2"),
        ("4k3/8/8/R7/8/8/8/R3K3 w - - 0 1", "a1a3", "R1a3"),
        ("8/P6k/8/8/8/8/8/4K3 w - - 0 1", "a7a8n", "a8=N"),
        ("3r3k/2P5/8/8/8/8/8/4K3 w - - 0 1", "c7d8q", "cxd8=Q+"),
        ("6k1/5ppp/8/8/8/8/8/R3K3 w - - 0 1", "a1a8", "Ra8#"),
    ],
)
def test_moves_read_back(fen, uci, text):
    board = chess.Board(fen)
    move = chess.Move.from_uci(uci)
    assert board.san(move) == text
    assert rules.read_move(board, f" {text} and so on") == move
    assert rules.read_move(board, f"{text}, or not") == move


def test_what_is_no_legal_move_is_not_read():
    board = chess.Board()
    for text in ("", "e5", "Nd2", "Bf3", "e45", "e4e", "O-O", "O-O-O-O", "1-0", "Mate: e4", "--", "@@@@", "e8=Q"):
        assert rules.read_move(board, text) is None, text
    two_knights = chess.Board("4k3/8/8/8/8/5N2/8/1N2K3 w - - 0 1")
    assert rules.read_move(two_knights, "Nd2") is None
    assert rules.read_move(two_knights, "Nfd2#") == chess.Move.from_uci("f3d2")  # marks do not matter


def test_boards_in_words_name_every_piece():
    board = chess.Board("4k3/7p/8/8/8/8/P7/3QK3 b - - 0 1")
    assert rules.board_words(board) == "white Ke1 Qd1 a2; black Ke8 h7"
    assert rules.side_to_move(board) == "Black"


def test_mates_and_checks_agree_with_the_slow_way():
    rng = random.Random(0)
    num_mates = 0
    for _ in range(12):
        board = chess.Board()
        for _ in range(100):
            expected = slow_mates(board)
            assert set(rules.mating_moves(board)) == expected
            checks = {move for move in board.legal_moves if board.gives_check(move)}
            assert checks <= set(rules.checking_moves(board)) <= set(board.legal_moves)
            num_mates += bool(expected)
            moves = list(board.legal_moves)
            if not moves:
                break
            board.push(rng.choice(moves))
    assert num_mates > 5


@pytest.mark.parametrize(
    ("fen", "mate"),
    [
        ("3k4/8/3K4/8/8/8/8/R7 w - - 0 1", "a1a8"),
        ("k7/2P5/1K6/8/8/8/8/8 w - - 0 1", "c7c8q"),  # a promotion
        ("4rkr1/4p1p1/4P3/8/8/8/8/4K2R w K - 0 1", "e1g1"),  # castling brings the rook to the king's file
    ],
)
def test_mates_of_special_moves(fen, mate):
    board = chess.Board(fen)
    assert {chess.Move.from_uci(mate)} <= set(rules.mating_moves(board)) == slow_mates(board)


def test_one_position_in_five_is_held_out():
    rng = random.Random(0)
    boards = [game.board(len(game.moves)) for game in (random_game(rng, max_plies=12) for _ in range(400))]
    share = sum(rules.is_held_out(board) for board in boards) / len(boards)
    assert abs(share - 0.2) < 0.08  # four standard errors


def test_without_the_library_the_extra_is_named(monkeypatch):
    real_import = builtins.__import__

    def no_chess(name, *rest):
        if name == "chess":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_chess)
    with pytest.raises(InputError, match=r"install qinglan\[chess\]"):
        CHESS_MIX["chess_game"][1](Draw(random.Random(0), held_out=False))


# ------------------------------------------------------------------------------------------------------------ games


def test_openings_are_legal_and_differ():
    lines = opening_moves()
    assert len(lines) == len(set(lines)) == len(OPENINGS)
    assert {len(line) for line in lines} == {10}


def test_every_game_is_legal_and_its_result_right():
    rng = random.Random(1)
    results = {}
    for make in (random_game, mated_game):
        for _ in range(40):
            game = make(rng)
            board = replay(game.texts())
            over = board.result() if board.is_checkmate() or board.is_stalemate() else "*"
            assert game.result == over
            assert game.is_mate == board.is_checkmate()
            assert game.board(len(game.moves)).board_fen() == board.board_fen()
            results[game.result] = results.get(game.result, 0) + 1
    assert results["1-0"] > 10 and results["0-1"] > 10 and results["*"] > 10


def test_better_players_win_more_material():
    values = {chess.QUEEN: 9, chess.ROOK: 5, chess.BISHOP: 3, chess.KNIGHT: 3, chess.PAWN: 1}

    def lead(players):
        rng, total = random.Random(2), 0
        for _ in range(40):
            game = play_game(rng, players)
            board = game.board(len(game.moves))
            total += sum(
                value * (len(board.pieces(kind, True)) - len(board.pieces(kind, False)))
                for kind, value in values.items()
            )
        return total / 40

    assert lead((PLAYERS["greedy"], PLAYERS["random"])) > 3
    assert lead((PLAYERS["random"], PLAYERS["careful"])) < -3


def test_the_corpus_never_shows_a_mate_from_a_held_out_position():
    rng = random.Random(3)
    for _ in range(60):
        game = mated_game(rng)
        num_plies = len(game.moves)
        assert not rules.is_held_out(game.board(num_plies - 1))
        assert num_plies < 3 or not rules.is_held_out(game.board(num_plies - 3))
    ends = [mated_game(rng, held_out=True) for _ in range(40)]
    assert any(rules.is_held_out(game.board(len(game.moves) - 1)) for game in ends)


# -------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("kind", CHESS_MIX)
def test_documents_repeat_and_hold_legal_moves(kind):
    make = CHESS_MIX[kind][1]
    texts = [text_of(make(Draw(random.Random(seed), held_out=False))) for seed in range(25)]
    assert texts == [text_of(make(Draw(random.Random(seed), held_out=False))) for seed in range(25)]
    assert len(set(texts)) == 25
    for text in texts:
        plain = text.replace("Mate in one: ", "").replace("Mate in two: ", "")
        if kind == "chess_position":
            words, moves = plain.split(" to move: ")
            board = board_from_words(words)
            board.turn = words.endswith("White")
            for move in moves_of(moves):
                to = rules.MOVE.match(move)[0].rstrip("+#").split("=")[0][-2:]
                if move[0] == "O" or ("x" in move and board.piece_at(chess.parse_square(to)) is None):
                    break  # castling rights and en passant are not named
                replay([move], board)
        else:
            game, _, words = plain.removeprefix("Chess: ").partition(" Board: ")
            words, _, mate = words.partition(" to move: ")
            board = replay(moves_of(game))
            if kind == "chess_mate":
                assert board.is_checkmate() and plain.endswith("0-1" if board.turn else "1-0")
            if kind == "chess_board":
                side = f" {rules.side_to_move(board)}" if mate else ""
                assert words == f"{rules.board_words(board)}.{side}"
                assert not mate or replay(moves_of(mate), board).is_checkmate()


def moves_of(text):
    return [word for word in text.split() if word not in ("1-0", "0-1", "*", "1/2-1/2")]


def board_from_words(words):
    board = chess.Board(None)
    for side in words.removeprefix("Board: ").split(". ")[0].split("; "):
        name, *pieces = side.split()
        for piece in pieces:
            symbol = piece[0] if len(piece) == 3 else "P"
            placed = chess.Piece.from_symbol(symbol if name == "white" else symbol.lower())
            board.set_piece_at(chess.parse_square(piece[-2:]), placed)
    return board


def test_announced_mates_are_there():
    rng, seen = random.Random(4), set()
    while len(seen) < 2:  # mate in two comes once in twenty documents or so
        text = text_of(CHESS_MIX["chess_mate"][1](Draw(rng, held_out=False)))
        for mark, plies in (("Mate in one:", 1), ("Mate in two:", 3)):
            if mark in text:
                before, after = text.split(f" {mark} ")
                moves = after.split()[:-1]
                assert len(moves) == plies and moves[-1].endswith("#")
                board = replay(before.removeprefix("Chess: ").split())
                assert rules.mating_moves(board) if plies == 1 else forced(board, moves[0])
                seen.add(mark)
    assert seen == {"Mate in one:", "Mate in two:"}


def forced(board, text):
    """Say by full search whether a move mates in two."""
    board = replay([text], board.copy())
    answers = list(board.legal_moves)
    for answer in answers:
        after = board.copy()
        after.push(answer)
        if not slow_mates(after):
            return False
    return bool(answers)


def test_shares_add_up_and_speed_is_told():
    assert sum(share for share, _ in CHESS_MIX.values()) == pytest.approx(1.0)
    rng = random.Random(5)
    kinds, shares = list(CHESS_MIX), [share for share, _ in CHESS_MIX.values()]
    start, num_moves = time.perf_counter(), 0
    for kind in rng.choices(kinds, shares, k=100):
        num_moves += len(text_of(CHESS_MIX[kind][1](Draw(rng, held_out=False))).split())
    print(f"\nchess documents: {num_moves / (time.perf_counter() - start):,.0f} moves, pieces and words a second")


# ---------------------------------------------------------------------------------------------------------- puzzles


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("kind", "count"), [("mate_in_one", 10), ("mate_in_two", 2)])
def test_puzzles_have_one_answer(kind, count, split):
    start = time.perf_counter()
    puzzles = draw_puzzles(kind, count, 0, split)
    print(f"\n{kind} {split}: {60 * count / (time.perf_counter() - start):,.0f} a minute")
    assert puzzles == draw_puzzles(kind, count, 0, split)
    assert puzzles != draw_puzzles(kind, count, 1, split)
    assert len({item.key["position"] for item in puzzles}) == count
    for item in puzzles:
        text = item.messages[0].content
        mark = " Mate in one:" if kind == "mate_in_one" else " Mate in two:"
        board = replay(text.removeprefix("Chess: ").removesuffix(mark).split())
        assert text.endswith(mark) and board.fen() == item.key["fen"]
        assert rules.is_held_out(board) == (split == "test")
        answers = slow_mates(board)
        if kind == "mate_in_two":
            assert not answers
            answers = {move for move in board.legal_moves if forced(board, board.san(move))}
        assert answers == {rules.read_move(board, item.key["answer"])}
        assert grade_puzzle(item.key, f" {item.good[0]} 1-0") == (True, True, True)
        assert grade_puzzle(item.key, item.good[0].rstrip("+#")) == (True, True, True)
        assert not grade_puzzle(item.key, item.faulty["wrong"]).is_exact
        assert grade_puzzle(item.key, item.faulty["wrong"]).is_legal
        for text in ("", "Mate", "Z1 " + item.good[0]):
            assert grade_puzzle(item.key, text) == (False, False, False)


def test_splits_share_no_position():
    train = {item.key["position"] for item in draw_puzzles("mate_in_one", 30, 0, "train")}
    test = {item.key["position"] for item in draw_puzzles("mate_in_one", 15, 0, "test")}
    assert not train & test


def test_another_mate_is_solved_but_not_exact():
    board = chess.Board("6k1/5ppp/8/8/8/8/8/RR2K3 w - - 0 1")  # either rook mates on the eighth rank
    key = {"fen": board.fen(), "answer": "Ra8#"}
    assert grade_puzzle(key, "Rb8#") == (False, True, True)
    assert grade_puzzle(key, "Ra8#") == (True, True, True)
    assert grade_puzzle(key, "Ra7") == (False, False, True)


def test_mate_in_two_by_hand():
    # The ladder: Rb7 cuts the seventh rank, and after any king's move the other rook mates; but it gives no check.
    assert only_mate_in_two(chess.Board("7k/8/8/8/8/8/8/RR2K3 w - - 0 1")) is None
    # Ra8+ and the only answer, Rd8 between, is taken with mate; nothing mates at once.
    board = chess.Board("6k1/3r1ppp/8/8/8/8/8/R3K3 w - - 0 1")
    assert only_mate_in_two(board) == chess.Move.from_uci("a1a8")


# ----------------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("name", CHESS_PROBES)
def test_probes_repeat_and_judge(name):
    def drawn():
        rng = random.Random(6)
        return [CHESS_PROBES[name](Draw(rng, held_out=False)) for _ in range(6)]

    probes = drawn()
    assert [probe.beginning for probe in probes] == [probe.beginning for probe in drawn()]
    for probe in probes:
        assert not probe.passes("") and not probe.passes(" 1-0") and not probe.passes(" e9")
        board = replay(probe.beginning.removeprefix("Chess: ").removesuffix(" Mate in one:").split())
        texts = [board.san(move) for move in board.legal_moves]
        passing = [text for text in texts if probe.passes(f" {text} and")]
        if name == "chess_legal_moves":
            assert passing == texts
        else:
            assert len(passing) == 1 and passing[0].endswith("#") and rules.is_held_out(board)


# ---------------------------------------------------------------------------------------------------------- Lichess

HEADER = "PuzzleId,FEN,Moves,Rating,RatingDeviation,Popularity,NbPlays,Themes,GameUrl,OpeningTags,SortKey\n"
ROW = "x1,6k1/5ppp/8/8/8/8/7r/R3K3 b - - 0 1,h2h1 e1e2,{rating},75,90,10,{themes},https://example.org,,1\n"


def test_lichess_rows_become_items(tmp_path):
    file = tmp_path / "puzzles.csv"
    file.write_text(HEADER + ROW.format(rating=1200, themes="endgame short"), encoding="utf-8")
    [item] = load_lichess_puzzles(file)
    # The opponent's h2h1 has been made; White answers Ke2.
    assert item.messages[0].content == "Board: white Ke1 Ra1; black Kg8 Rh1 f7 g7 h7. White to move:"
    assert item.good == ("Ke2",) and item.key["rating"] == 1200 and item.key["id"] == "x1"
    assert item.key["kind"] == "best_move" and {"lichess", "endgame", "short"} <= set(item.tags)
    assert grade_puzzle(item.key, "Ke2") == (True, True, True)
    file.write_text(HEADER + ROW.format(rating=1200, themes="mate mateIn1"), encoding="utf-8")
    assert load_lichess_puzzles(file)[0].messages[0].content.endswith("White to move: Mate in one:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("PuzzleId,FEN\n", "has no column Moves, Rating, Themes"),
        (HEADER + "x1,what,e2e4 e7e5,1,1,1,1,short,u,,1\n", "puzzles.csv:2: "),
        (HEADER + "x1,8/8/8/8/8/8/8/8 w - - 0 1,e2e4 e7e5,1,1,1,1,short,u,,1\n", "no legal position"),
        (HEADER + ROW.format(rating=1, themes="s").replace("e1e2", "e1e5"), "puzzles.csv:2: illegal uci"),
        (HEADER + ROW.format(rating=1, themes="s").replace(" e1e2", ""), "1 moves in 'h2h1'"),
        (HEADER + ROW.format(rating="high", themes="s"), "invalid literal"),
        (HEADER + ROW.format(rating=1, themes="s") + "x2,6k1/8/8/8/8/8/8/4K3 b - - 0 1\n", "puzzles.csv:3: "),
    ],
)
def test_broken_lichess_files_are_named_by_line(tmp_path, content, message):
    file = tmp_path / "puzzles.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_lichess_puzzles(file)
    assert message in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        load_lichess_puzzles(tmp_path / "none.csv")


@pytest.mark.real
def test_real_lichess_puzzles():
    folder = os.environ.get("QINGLAN_REAL_DATA")
    if not folder:
        pytest.skip("QINGLAN_REAL_DATA is not set: real data is NOT tested")
    items = load_lichess_puzzles(Path(folder) / "classification/chess_puzzles/puzzles.csv")
    assert len(items) == len({item.key["id"] for item in items}) > 500
    kinds = {kind: [item for item in items if item.key["kind"] == kind] for kind in ("best_move", "mate_in_two")}
    assert all(len(found) > 50 for found in kinds.values())
    for item in items:
        assert grade_puzzle(item.key, item.good[0]) == (True, True, True)
        board = chess.Board(item.key["fen"])
        words, side = item.messages[0].content.split(" to move:")[0].rsplit(". ", 1)
        assert board_from_words(words).board_fen() == board.board_fen()
        assert side == rules.side_to_move(board)
    assert all(forced(chess.Board(item.key["fen"]), item.good[0]) for item in kinds["mate_in_two"][:20])
