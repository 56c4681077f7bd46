"""Reasoning traces: what a model writes for itself before it answers never counts as its answer."""

from typing import NamedTuple

TAGS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3 and most others
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
"""How traces begin and end."""


class Traces(NamedTuple):
    """A reply in two."""

    trace: str  # what was written inside the tags
    answer: str  # what was written outside, without the white space behind a trace
    open: bool  # whether a trace was never closed: then there is no answer yet


def split_traces(text: str, prompt_tail: str = "") -> Traces:
    r"""Split a reply into reasoning trace and answer.

    prompt_tail: the end of the prompt; where that opens a trace, the reply starts inside it. A
    closing tag that nothing opened closes a trace from the start of the reply.

    >>> split_traces("<think>2 * 9</think>\n\nIt is 18.")
    Traces(trace='2 * 9', answer='It is 18.', open=False)
    >>> split_traces("2 * 9 is", prompt_tail="Assistant: <think>\n")
    Traces(trace='2 * 9 is', answer='', open=True)
    """
    traces: list[str] = []
    answer, at = "", 0
    end = opened_by(prompt_tail)
    while True:
        if end is not None:
            stop = text.find(end, at)
            if stop < 0:
                return Traces("".join([*traces, text[at:]]), "", True)
            traces.append(text[at:stop])
            at, end = stop + len(end), None
        start, tag, closing = _next_tag(text, at)
        answer += text[at:start]
        if tag == "":
            return Traces("".join(traces), answer.lstrip() if traces else answer, False)
        at = start + len(tag)
        if tag == closing:  # opened by nothing that we see
            traces.append(answer)
            answer = ""
        else:
            end = closing


def opened_by(prompt_tail: str) -> str | None:
    r"""Return the tag that closes the trace which the end of a prompt opens, or None.

    >>> opened_by("<think>\n"), opened_by("<think>\n\n</think>\n\n")
    ('</think>', None)
    """
    tail = prompt_tail.rstrip()
    return next((closing for opening, closing in TAGS if tail.endswith(opening)), None)


def _next_tag(text: str, at: int) -> tuple[int, str, str]:
    """Return where the next tag is, the tag, and what closes it; no tag at the end of the text."""
    found = [
        (start, tag, closing)
        for opening, closing in TAGS
        for tag in (opening, closing)
        if (start := text.find(tag, at)) >= 0
    ]
    return min(found, default=(len(text), "", ""))
