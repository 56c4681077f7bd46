r"""Markdown and LaTeX taken off a reply, so that ``**18**``, ``\text{B}`` and ``$18$`` are read."""

import re

_FRACTION = re.compile(
    r"(?P<before>[0-9])?\\[cdt]?frac\s*"
    r"(?:\{\s*(?P<a>-?[0-9][0-9.,]*)\s*\}\s*\{\s*(?P<b>[0-9][0-9,]*)\s*\}"
    r"|(?P<c>[0-9])\s*(?P<d>[0-9]))"
)
_STYLED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|operatorname|mbox|emph)"
    r"\s*\{([^{}]*)\}"
)
_STRUCK = re.compile(r"~~[^~\n]+~~")
_EMPHASIS = (
    re.compile(r"(?<![\w*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1"),  # 2**3**2 is no emphasis
    re.compile(r"(?<![\w*])(\*)(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])"),
    re.compile(r"(?<![\w_])(_)(?=\S)([^_\n]+?)(?<=\S)_(?![\w_])"),
)
_COMMANDS = (
    (re.compile(r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3})"), ","),  # 1{,}450 and 1\,450
    (re.compile(r"\\!|\\left\b|\\right\b|\\displaystyle\b|`"), ""),
    (re.compile(r"\\(?:times|cdot|ast)\b"), "*"),
    (re.compile(r"\\div\b"), "÷"),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\[,;:> ()\[\]]|~"), " "),
)
_BRACE = re.compile(r"\\f?boxed\s*\{|[{}]")


def plain(text: str) -> str:
    r"""Return a text without emphasis and LaTeX; struck text is gone, fractions are a/b.

    >>> plain(r"**Answer:** \(1{,}450\) \text{eggs}, 2\frac{1}{2}, \$3")
    'Answer:  1,450  eggs, 2 1/2, $3'
    """
    text = _FRACTION.sub(_divided, text)
    while (styled := _STYLED.sub(r"\1", text)) != text:
        text = styled
    text = _STRUCK.sub("", text)
    for pattern, instead in _COMMANDS:
        text = pattern.sub(instead, text)
    for pattern in _EMPHASIS:
        text = pattern.sub(r"\2", text)
    return text


def boxes(text: str) -> list[str]:
    r"""Return what stands in each ``\boxed{}``, braces inside matched; one never closed is none.

    >>> boxes(r"\boxed{\frac{3}{4}}, then \boxed{B} and \boxed{1")
    ['\\frac{3}{4}', 'B']
    """
    return _boxes(text)[0]


def before_open_box(text: str) -> str:
    r"""Return the text up to a ``\boxed{`` that is cut off: its number may lack digits.

    >>> before_open_box(r"It is 180, so \boxed{18")
    'It is 180, so '
    """
    return text[: _boxes(text)[1]]


def _boxes(text: str) -> tuple[list[str], int]:
    """Return what is boxed, and where the first box that is never closed begins."""
    closed, opened = [], []
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            opened.append(match)
        elif opened and (last := opened.pop())[0] != "{":
            closed.append(text[last.end() : match.start()])
    unclosed = (match.start() for match in opened if match[0] != "{")
    return closed, next(unclosed, len(text))


def _divided(match: re.Match[str]) -> str:
    before = f"{match['before']} " if match["before"] else ""
    above, below = match["a"] or match["c"], match["b"] or match["d"]
    return f"{before}{above}/{below.replace(',', '')}"
