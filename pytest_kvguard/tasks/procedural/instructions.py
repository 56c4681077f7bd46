"""A system text of two to four rules that every answer must obey, marked rule by rule."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from pytest_kvguard.errors import UnknownName
from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.procedural.exercises import (
    STOP,
    Exercise,
    Split,
    draw_samples,
    exercise,
    split_of,
)
from pytest_kvguard.tasks.procedural.retrieval_facts import filler
from pytest_kvguard.tasks.procedural.words import ENDINGS, ITEMS, NAMES, OPENINGS

INTRODUCTION = "Obey these rules in every answer."
ITEMS_EACH = 3
KINDS = ("begin", "end", "never", "capitals")


@dataclass(frozen=True)
class Rule:
    """One rule: how a system text states it and how an answer is checked for it."""

    kind: str  # a key of CHECKS
    word: str
    sentence: str


def instructions(
    *,
    n: int = 100,
    rules: int = 3,
    people: int = 10,
    sentences: int = 20,
    without: str = "",
    seed: int = 0,
) -> Task:
    """Return ``n`` questions under ``rules`` (2..4) rules about ``people`` (1..10) people.

    What the people have stands among ``sentences`` (0..100) that tell nothing about them.
    ``without`` is a kind of rule that is never given: begin, end, never or capitals.
    """
    if without != "" and without not in KINDS:
        raise UnknownName("kind of rule", str(without), KINDS)
    check_count("rules", rules, 2, len(KINDS) - bool(without))
    check_count("people", people, 1, len(ITEMS) // ITEMS_EACH)
    check_count("sentences", sentences, 0, 100)
    return Task(
        name="instructions",
        ability="instructions",
        samples=draw_samples(
            lambda rng: draw_question(rng, rules, people, sentences, without), n, seed
        ),
        scorer=share_of_rules_obeyed,
        max_new_tokens=40,
        stop=(STOP,),
        source="procedural",
        params={
            "rules": rules,
            "people": people,
            "sentences": sentences,
            "without": without,
            "seed": seed,
        },
    )


def draw_question(
    rng: Random, rules: int, people: int, sentences: int, without: str = ""
) -> Exercise:
    """Draw one question of the test split."""
    names = rng.sample(NAMES, people)
    while True:
        items = dict(zip(names, deal_items(rng, people), strict=True))
        asked = rng.choice(names)
        given = draw_rules(rng, rules, items[asked], without)
        if split_of_answer(given, items[asked]) == "test":
            break
    parts = [*system_parts(given), *document_parts(rng, items, sentences)]
    parts.append(Part("question", f"Q: {question(asked)}\nA:"))
    target = tuple(f"{rule.kind} {rule.word}" for rule in given)
    target += tuple(f"lists {item}" for item in items[asked] if f"never {item}" not in target)
    labels = (f"rules={rules}", f"people={people}")
    return exercise(
        "instructions", parts, f" {obedient(asked, items[asked], given)}", target, labels
    )


def deal_items(rng: Random, people: int) -> list[tuple[str, ...]]:
    """Deal ITEMS_EACH items to each; no two people have the same."""
    dealt = iter(rng.sample(ITEMS, people * ITEMS_EACH))
    return list(zip(*[dealt] * ITEMS_EACH, strict=True))


def draw_rules(
    rng: Random, count: int, items: tuple[str, ...], without: str = ""
) -> tuple[Rule, ...]:
    """Draw ``count`` rules of different kinds; what is never mentioned is the last item."""
    begin, end, never = rng.choice(OPENINGS), rng.choice(ENDINGS), items[-1]
    rules = (
        Rule("begin", begin, f"Begin with the word {begin}."),
        Rule("end", end, f"End with the word {end}."),
        never_mention(never),
        Rule("capitals", "", "Write in capitals."),
    )
    return tuple(rng.sample([rule for rule in rules if rule.kind != without], count))


def never_mention(item: str) -> Rule:
    """Return the rule that this item must be left out."""
    return Rule("never", item, f"Never mention the {item}.")


def split_of_answer(rules: tuple[Rule, ...], items: tuple[str, ...]) -> Split:
    """Return where these items under these rules belong."""
    return split_of(" ".join([*(rule.sentence for rule in rules), *items]))


def system_parts(rules: tuple[Rule, ...]) -> list[Part]:
    """Return the system text, a unit per rule."""
    parts = [Part("system", INTRODUCTION)]
    for rule in rules:
        end = "\n\n" if rule is rules[-1] else ""
        parts.append(Part("system", f" {rule.sentence}{end}", unit=f"rule {rule.kind}"))
    return parts


def document_parts(rng: Random, items: Mapping[str, tuple[str, ...]], sentences: int) -> list[Part]:
    """Scatter what people have among filler, a line and a unit each; the last ends a paragraph."""
    lines = [belongings(name, has) for name, has in items.items()]
    lines += [f"{filler(rng)}\n" for _ in range(sentences)]
    rng.shuffle(lines)
    lines[-1] += "\n"
    return [Part("document", line, unit=f"sentence {i}") for i, line in enumerate(lines)]


def belongings(name: str, items: tuple[str, ...]) -> str:
    """Return the line ``Ana has lamp, rope, coin.``."""
    return f"{name} has {', '.join(items)}.\n"


def question(name: str) -> str:
    """Return ``What does Ana have?``."""
    return f"What does {name} have?"


def obedient(name: str, items: tuple[str, ...], rules: tuple[Rule, ...]) -> str:
    """Return the answer that lists the items and obeys every rule: ``hello Ana has lamp done``."""
    word = {rule.kind: rule.word for rule in rules}
    banned = {rule.word for rule in rules if rule.kind == "never"}
    listed = ", ".join(item for item in items if item not in banned)
    answer = " ".join(filter(None, (word.get("begin"), f"{name} has {listed}", word.get("end"))))
    return answer.upper() if "capitals" in word else answer


def share_of_rules_obeyed(completion: str, sample: Sample) -> float:
    """Return the share of rules obeyed; listing all that was asked for counts as one rule more.

    An answer that lists nothing of it obeys nothing.
    """
    checks = [target.split(" ") for target in sample.target]
    listed = [CHECKS[kind](completion, word) for kind, word in checks if kind == "lists"]
    obeyed = [CHECKS[kind](completion, word) for kind, word in checks if kind != "lists"]
    marks = [*obeyed, all(listed)]
    return sum(marks) / len(marks) if any(listed) else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


CHECKS: Mapping[str, Callable[[str, str], bool]] = {
    "begin": lambda text, word: _words(text)[:1] == [word],
    "end": lambda text, word: _words(text)[-1:] == [word],
    "never": lambda text, word: word not in _words(text),
    "capitals": lambda text, _: text == text.upper(),
    "lists": lambda text, word: word in _words(text),
}
