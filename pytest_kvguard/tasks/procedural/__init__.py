"""Tasks drawn by rule, so that there is no end of them and every answer is known.

Plain English templates over closed inventories of words: any model can read them, and one of a
million parameters can learn them. One instance in ten is held out by a digest of its text
(`exercises.split_of`): the tasks ask only such instances.
"""

from collections.abc import Callable

from pytest_kvguard.tasks.base import Task
from pytest_kvguard.tasks.procedural.facts import facts
from pytest_kvguard.tasks.procedural.instructions import instructions
from pytest_kvguard.tasks.procedural.long_answers import long_answers
from pytest_kvguard.tasks.procedural.retrieval_facts import retrieval_facts
from pytest_kvguard.tasks.procedural.word_problems import word_problems

PROCEDURAL: dict[str, Callable[..., Task]] = {
    "facts": facts,
    "instructions": instructions,
    "long_answers": long_answers,
    "retrieval_facts": retrieval_facts,
    "word_problems": word_problems,
}
