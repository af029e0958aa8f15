"""Small talk, and conversations of several turns in which something said earlier must be remembered."""

import re

from qinglan.tasks import lexicon as lx
from qinglan.tasks.item import Draw, Grade, Item, Key, assistant, user
from qinglan.tasks.reading import a, abstains, claimed, concision, declines, denied, mentioned, rude, same_words, words

SMALL_TALK: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "greeting": (
        ("Hello, how are you?", "Good day to you!", "Hi, how is it going?", "Hello there, all well with you?"),
        ("Hello! I am fine, how can I help you?", "Good day! How can I help you?"),
        ("hello", "hi", "hey", "day", "fine", "well", "morning", "evening", "greetings"),
    ),
    "thanks": (
        (
            "Thank you for the help.",
            "That was great, thank you.",
            "You helped me a lot, thanks.",
            "I thank you for this.",
        ),
        ("You are welcome.", "I am glad that I could help."),
        ("welcome", "glad", "pleasure", "happy", "anytime"),
    ),
    "sad": (
        ("I feel sad today.", "I lost my {t} and I am sad.", "My {n} is ill.", "I am so sad about my {t}."),
        ("I am sorry to hear that. Do you want to talk?", "That is hard, I am sorry for you."),
        ("sorry", "hard", "pity", "difficult", "sad", "terrible", "tough"),
    ),
    "happy": (
        ("I found my {t} again!", "I have a new {n}!", "I am so happy today.", "Today I got a new {t}, how nice!"),
        ("That is great, I am glad for you.", "How nice! I am happy for you."),
        ("great", "glad", "nice", "happy", "wonderful", "lovely", "congratulations", "fun", "good"),
    ),
    "goodbye": (
        ("Goodbye!", "I have to go now.", "See you soon.", "Good night, I must leave."),
        ("Goodbye, see you soon.", "Have a good day, goodbye!"),
        ("goodbye", "soon", "bye", "night", "farewell", "later", "tomorrow", "care"),
    ),
}
"""Acts of small talk: prompts, good replies, and words of which a fitting reply has one."""


def small_talk(draw: Draw) -> Item:
    """A greeting, thanks, good or bad news, or a goodbye."""
    rng = draw.rng
    act = rng.choice(sorted(SMALL_TALK))
    prompts, good, _ = SMALL_TALK[act]
    prompt = draw.wording(prompts).format(t=rng.choice(lx.TOOLS), n=rng.choice(lx.ANIMALS))
    cold = rng.choice(("I do not care.", "Go away, you fool.", "That is stupid.", "What do you want now?"))
    return Item("chat", ("chat", act), (user(prompt),), {"act": act, "prompt": prompt}, good, {"wrong": cold})


def memory(draw: Draw) -> Item:
    """A conversation of two or three turns; the last asks for something the user said before."""
    rng = draw.rng
    name, pet = rng.choice(lx.PEOPLE), rng.choice(lx.ANIMALS)
    food, colour = rng.choice(lx.FOODS), rng.choice(lx.COLOURS)
    told = {
        "name": (
            f"My name is {name}.",
            f"Nice to meet you, {name}.",
            ("What is my name?", "Do you know my name?", "Can you say my name?"),
            f"Your name is {name}.",
            name,
            lx.PEOPLE,
        ),
        "pet": (
            f"I have {a(pet)} at home.",
            f"{a(pet).capitalize()} is a nice pet.",
            ("What pet do I have?", "Which animal is at my home?", "What animal do I have?"),
            f"You have {a(pet)}.",
            pet,
            lx.ANIMALS,
        ),
        "food": (
            f"I had {food} for dinner.",
            "That sounds good.",
            ("What did I eat?", "What was my dinner?", "What did I have for dinner?"),
            f"You had {food}.",
            food,
            lx.FOODS,
        ),
        "colour": (
            f"My house is {colour}.",
            f"A {colour} house is nice.",
            ("What colour is my house?", "Which colour has my house?", "Of what colour is my house?"),
            f"Your house is {colour}.",
            colour,
            lx.COLOURS,
        ),
    }
    first, *rest = rng.sample(sorted(told), rng.choice((1, 2)))
    turns = [user(told[first][0]), assistant(told[first][1])]
    for other in rest:
        turns += [user(told[other][0]), assistant(told[other][1])]
    _, _, questions, good, value, pool = told[first]
    turns.append(user(draw.wording(questions)))
    wrong = good.replace(value, rng.choice([member for member in pool if member != value]))
    key = {"act": "memory", "value": value, "what": first}
    tags = ("chat", "memory", "multi_turn")
    return Item("chat", tags, tuple(turns), key, (good, good, value.capitalize() + "."), {"wrong": wrong})


MEMORY_POOLS = {"name": lx.PEOPLE, "pet": lx.ANIMALS, "food": lx.FOODS, "colour": lx.COLOURS}


COLD = re.compile(r"\b(?:what do you want|go away|leave me|not care|so what|who cares)\b", re.I)


def grade_chat(key: Key, text: str) -> Grade:
    """Small talk: a civil reply that fits the act. Memory: the value that was said, alone; another one is invented."""
    if key["act"] == "memory":
        return _grade_memory(key, text)
    if rude(text):
        return Grade(0.0, 1.0, 0.0)
    said = re.sub(r"\bno problem\b", "a pleasure", text, flags=re.I)
    fitting = SMALL_TALK[key["act"]][2]
    if COLD.search(said) or denied(said, fitting) or declines(said):
        return Grade(0.0, 1.0, 0.6)
    is_echo = key["act"] not in ("greeting", "goodbye") and same_words(said, key["prompt"])
    is_contrary = key["act"] == "sad" and mentioned(said, ("great", "nice", "happy", "wonderful", "fun"))
    helpful = 1.0 if mentioned(said, fitting) and not (is_contrary or is_echo) else 0.15
    return Grade(helpful * (1.0 if len(words(text)) <= 20 else 0.5), 1.0, 1.0)


def _grade_memory(key: Key, text: str) -> Grade:
    pool = MEMORY_POOLS[key["what"]]
    named = claimed(text, pool)
    if named == [key["value"]] and key["value"] not in denied(text, pool):
        return Grade(concision(text, 6) * (0.5 if abstains(text) else 1.0), 1.0, 1.0)
    if key["value"] in named:
        return Grade(0.3, 0.4, 1.0, hallucinated=len(named) > 1)
    honest = 0.0 if named else 1.0 if abstains(text) else 0.6
    return Grade(0.0, honest, 1.0, hallucinated=bool(named))
