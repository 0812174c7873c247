"""Pages that are written when the site is built: docs/methods/, one for every name of `dtrp.list_methods`, and docs/cli.md.

A method's page has its row and docstring, and what the schedule and the simulator say of it; the command line's has what ``--help``
says. Nothing is said twice by hand.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import click
from sphinx.application import Sphinx

import dtrp
from dtrp import schedule
from dtrp.cli import cli

FOLDER = Path(__file__).parent / "methods"
STAGES = 4
LABELS = "Update and delay|Update|Delay|Memory|Time|Source|Differences|Stated there|Our reading"


def page(name: str) -> str:
    """The page of a method, as Markdown."""
    method = dtrp.get_method(name)
    first, _, rest = inspect.cleandoc(method.__doc__ or "").partition("\n")
    parts = [f"# {name}", linked(first), _labelled(rest)]
    parts += ["## The order of work", _order(method)]
    parts += ["## Delay, memory and time", _numbers(method)]
    parts += ["## The row", _row(method)]
    return "\n\n".join(parts) + "\n"


def _labelled(text: str) -> str:
    """``Update: ...`` and its like as paragraphs of their own, what comes before and between them as it is."""
    text = re.sub(r"(?<=[.)]) (?=(?:Delay|Memory|Time|Our reading):)", "\n", text)
    paragraphs = re.split(rf"\n(?=(?:{LABELS})\b)", text)
    return linked("\n\n".join(re.sub(rf"^({LABELS})( \([^)]*\))?:", r"**\1**\2:", p.strip()) for p in paragraphs))


def linked(text: str) -> str:
    """arXiv numbers and the paper's DOI as links."""
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return text.replace("e0276427", "[e0276427](https://doi.org/10.1371/journal.pone.0276427)")


def _order(method: dtrp.Method) -> str:
    parts, minibatches = (4, 2) if method.flush else (1, 5 if method.split_backward else 8)
    cut = " cut into four micro-batches" if method.flush else ""
    return (
        f"{STAGES} stages, {minibatches} mini-batches{cut}, a column a slot; the small v is the version of the weights, how\n"
        "many updates the stage has made.\n\n"
        f"```{{grid}} {method.name}\n:stages: {STAGES}\n:minibatches: {minibatches}\n:microbatches: {parts}\n"
        ":show: versions\n```"
    )


def _numbers(method: dtrp.Method) -> str:
    text = (
        "Steady state, for one micro-batch in a mini-batch and for as many as stages. *Holds*: micro-batches between their F\n"
        f"and their B, at most, of which the stage keeps the {method.keep}.\n\n"
        "| stage | lead | delay, A=1 | holds | delays, A=4 | holds |\n|---|---|---|---|---|---|\n"
    )
    runs = [dtrp.Schedule.build(method, STAGES, 12, parts) for parts in (1, STAGES)]
    for stage in range(STAGES):
        cells = [str(stage), "all" if method.forward_all else str(schedule.lead(method, STAGES, stage))]
        for parts, run in zip((1, STAGES), runs, strict=True):
            delays = {schedule.steady_delay(method, STAGES, stage, parts, j) for j in range(parts)}
            cells += [" or ".join(map(str, sorted(delays))), str(run.peak_stash()[stage])]
        text += "| " + " | ".join(cells) + " |\n"
    text += (
        "\nTime of a mini-batch when a message takes so long (simulated; a forward of the whole mini-batch on one stage takes\n"
        "1, its backward 2; who keeps graphs can do no better than 3, who recomputes them than 4):\n\n"
    )
    latencies = (0, 0.5, 1, 2)
    text += "| | " + " | ".join(f"{c:g}" for c in latencies) + " |\n|---|" + "---|" * len(latencies) + "\n"
    for parts in (1, STAGES):
        times = [
            dtrp.simulate(
                method, num_stages=STAGES, num_minibatches=60, num_microbatches=parts,
                forward_s=1 / parts, backward_s=2 / parts, latency_s=c,
            ).minibatch_s
            for c in latencies
        ]  # fmt: skip
        text += f"| A={parts} | " + " | ".join(f"{time:.2f}" for time in times) + " |\n"
    return text


def _row(method: dtrp.Method) -> str:
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", inspect.cleandoc(dtrp.Method.__doc__ or ""), re.M))
    text = (
        f'`dtrp.get_method("{method.name}")`; any field can be changed there.\n\n| field | value | |\n|---|---|---|\n'
    )
    for field in dataclasses.fields(method):
        meaning = " ".join(meanings.get(field.name, "").split()).replace("|", "\\|")
        text += f"| `{field.name}` | `{getattr(method, field.name)!r}` | {meaning} |\n"
    return text


def index(names: list[str]) -> str:
    """The page that lists the methods."""
    text = (
        "# The methods\n\nEach is a row of values over one engine. Each page is made from the row's docstring, its schedule and\n"
        "the simulator.\n\n"
        "| method | | delay at stage 0 of 4 | keeps |\n|---|---|---|---|\n"
    )
    for name in names:
        method = dtrp.get_method(name)
        first = linked((method.__doc__ or "").split("\n")[0])
        delay = schedule.steady_delay(method, STAGES, 0, 1, 0)
        text += f"| [{name}]({name}.md) | {first} | {delay}{', predicted over' if method.predict else ''} | {method.keep} |\n"
    return text + "\n```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```\n"


def commands() -> str:
    """The command line, as Markdown."""
    parts = ["# The command line"]
    parts += ["`dtrp COMMAND --help` says the same. A user's mistake is one line on standard error and exit code 2."]
    top = click.Context(cli, info_name="dtrp", **cli.context_settings)
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top)
        parts += [f"## dtrp {name}", _coded(inspect.cleandoc(command.help or ""))]
        parts += [f"```text\ndtrp {name} {' '.join(command.collect_usage_pieces(context))}\n```"]
        records = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
        parts += [_option(*record) for record in records]
    return "\n\n".join(parts) + "\n"


def _option(name: str, text: str) -> str:
    """An option with its help text, as an item of a definition list."""
    choices = re.search(r" \[(.*\|.*)\]", name)
    if choices:
        name = name.replace(choices[0], "")
        text += " One of " + ", ".join(f"`{choice}`" for choice in choices[1].split("|")) + "."
    text = re.sub(r" *\[default: (.*?)\]", r" Default: `\1`.", text)
    text = re.sub(r" *\[required\]", " Required.", text)
    return f"`{name}`\n: " + _coded(text)


def _coded(text: str) -> str:
    """Commands and options in a help text as code."""
    parts = re.sub(r"'(dtrp [^']*)'", r"`\1`", text).split("`")  # every other one is code already
    return "`".join(
        re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", s) if i % 2 == 0 else s for i, s in enumerate(parts)
    )


def write(app: Sphinx) -> None:
    """Write what has changed, and remove the pages of methods that are gone."""
    FOLDER.mkdir(exist_ok=True)
    names = dtrp.list_methods()
    pages = {FOLDER / f"{name}.md": page(name) for name in names}
    pages |= {FOLDER / "index.md": index(names), FOLDER.parent / "cli.md": commands()}
    for old in FOLDER.glob("*.md"):
        if old not in pages:
            old.unlink()
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def is_builtin(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Whether a member comes from a class of Python's own, such as an exception's ``add_note``, and is left out."""
    return True if hasattr(member, "__objclass__") else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    app.connect("autodoc-skip-member", is_builtin)
    return {"parallel_read_safe": True}
