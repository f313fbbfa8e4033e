"""Code of the documentation's pages."""

import re


def printed(text, language="python"):
    """Blocks of code, each with the ``text`` block right behind it: what it prints.

    A block's ``hl_lines`` and the like may follow the language.
    """
    return re.findall(
        rf"^```{language}\b.*?\n(.*?)^```\n(?:\n(?:[^\n`]+\n\n)?```text\n(.*?)^```)?",
        text,
        re.DOTALL | re.M,
    )


def run(text, name, capsys):
    """All Python blocks, from top to bottom, which print what is shown; returns what they define."""
    scope = {"__name__": name}
    for code, shown in printed(text):
        exec(compile(code, name, "exec"), scope)
        assert capsys.readouterr().out == shown or not shown
    return scope
