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
LEGEND = (
    "*Letters:* a stage $k$ has $d$ stages after it. $w_k(b)$ are its weights after $b$ updates, $\\eta$ is the\n"
    "learning rate, and $f_b$ the loss of mini-batch $b$. The output of a stage is $\\mathrm{out}(h; w_k)$ for the\n"
    "input $h$, and $g$ is the gradient of the loss with respect to it. A mini-batch has $A$\n"
    "micro-batches. More in [concepts](../concepts.md)."
)
LABELS = "Update and delay|Update|Delay|Memory|Time|Source|Differences|Stated there|Our reading"


def page(name: str) -> str:
    """The page of a method, as Markdown."""
    method = dtrp.get_method(name)
    first, _, rest = inspect.cleandoc(method.__doc__ or "").partition("\n")
    parts = [f"# {name}", linked(first), _labelled(rest)]
    parts += [LEGEND, "## The order of work", _order(method)]
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
    cut = ", each cut into four micro-batches" if method.flush else ""
    if method.flush:
        when = ", in every mini-batch"
    elif _is_full(method):
        when = ", at the start and at the end only"
    elif method.split_backward:
        when = "; the last stage has no forward to repeat"
    else:
        when = (
            ". Here a message takes a whole column; on fast links it takes next to no time, and no stage waits for it"
        )
    parts_of_backward = (
        "; a backward is in two parts, I and W" + ", and R is a repeated forward" * (method.keep == "input")
        if method.split_backward
        else ""
    )
    return (
        f"{STAGES} stages and {minibatches} mini-batches{cut}. F3 is the forward of micro-batch 3, B3 its\n"
        f"backward, and the bar at the end of a cell an update{parts_of_backward}. The small v is the version of the\n"
        f"weights: how many updates the stage has made. A grey cell is a stage that waits{when}.\n\n"
        f"```{{grid}} {method.name}\n:stages: {STAGES}\n:minibatches: {minibatches}\n:microbatches: {parts}\n"
        ":show: versions\n```"
    )


def _is_full(method: dtrp.Method) -> bool:
    """Whether all stages have work in each slot, from where the last one has a forward and the first one a backward."""
    rows = [[cell.split() for cell in line.split("|")[1:]] for line in str(dtrp.Schedule.build(method, STAGES, 8)).splitlines()
            if line.startswith("stage")]  # fmt: skip
    first, *_, last = ([any(action[0] == "F" for action in cell) for cell in row] for row in (rows[0], rows[-1]))
    backward = next(i for i, cell in enumerate(rows[0]) if any(action[0] in "BI" for action in cell))
    begins, ends = max(last.index(True), backward), len(first) - 1 - first[::-1].index(True)
    return all(cell for row in rows for cell in row[begins : ends + 1])


def _numbers(method: dtrp.Method) -> str:
    text = (
        "Between start and end of a run, with one micro-batch in a mini-batch (A=1) and with as many as stages (A=4). *Holds* is\n"
        f"the largest number of micro-batches between their F and their B, of each of which the stage keeps the {method.keep}.\n\n"
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
        "\nThe simulated time of a mini-batch, for messages that take as long as the columns say. A forward of\n"
        "the whole mini-batch on one stage takes 1 and its backward 2, so a method that keeps graphs\n"
        "needs at least 3, and one that recomputes 4:\n\n"
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
        f'The values of `dtrp.get_method("{method.name}")`, which takes other values by keyword.\n\n'
        "| field | value | |\n|---|---|---|\n"
    )
    for field in dataclasses.fields(method):
        meaning = " ".join(meanings.get(field.name, "").split()).replace("|", "\\|")
        text += f"| `{field.name}` | `{getattr(method, field.name)!r}` | {meaning} |\n"
    return text


def index(names: list[str]) -> str:
    """The page that lists the methods."""
    text = (
        "# The methods\n\nEvery method is a row of values, and one engine runs them all. The page of a method\n"
        "has its update rule, its order of work, its delay, memory and time, and its source. Which one to take:\n"
        "[how to choose](../choose.md).\n\n"
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
    parts += [
        "`dtrp COMMAND --help` prints the same. A value in parentheses is a default. A mistake in a command is one line\n"
        "on standard error, and exit code 2."
    ]
    top = click.Context(cli, info_name="dtrp", **cli.context_settings)
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top)
        parts += [f"## dtrp {name}", _coded(inspect.cleandoc(command.help or ""))]
        parts += [f"```text\ndtrp {name} {' '.join(command.collect_usage_pieces(context))}\n```"]
        records = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
        parts += [_option(*record) for record in records if record[1]]
    return "\n\n".join(parts) + "\n"


def _option(name: str, text: str) -> str:
    """An option with its help text, as an item of a definition list."""
    choices = re.search(r" \[(.*\|.*)\]", name)
    if choices:
        name = name.replace(choices[0], "")
        text += " One of " + ", ".join(f"`{choice}`" for choice in choices[1].split("|")) + "."
    text = re.sub(r" *\[((?:default: |x[<>]|required)[^\]]*)\]", lambda found: _facts(found[1]), text)
    return f"`{name.replace(' RANGE', '')}`\n: " + _coded(text)


def _facts(text: str) -> str:
    """What click says in brackets, such as ``default: 3; x>=1; required``, in sentences."""
    forms = {"default": "Default: `{}`.", "x>": "Above {}.", "x>=": "At least {}.", "required": "Required."}
    facts = (re.fullmatch(r"(default|x>=|x>|required)(?:: )?(.*)", fact) for fact in text.split("; "))
    return "".join(" " + forms[fact[1]].format(fact[2]) for fact in facts if fact is not None)


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
