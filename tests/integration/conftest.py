"""Targets of the family suite, and docs/models.md, which is written from what passed."""

import re
from pathlib import Path

import pytest
from families import FAMILIES

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
TARGETS = {
    "torch-cpu": "PyTorch backend on a CPU",
    "triton-cuda": "Triton kernels on a GPU",
}
OUTCOMES = pytest.StashKey()


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ],
)
def target(request):
    """Backend and device of the family suite."""
    return request.param


def pytest_addoption(parser):
    parser.addoption(
        "--write-models-table", action="store_true", help="write docs/models.md from what passed, instead of comparing"
    )


def pytest_configure(config):
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("contract")
    if marker is not None and (report.when == "call" or report.outcome == "skipped"):
        parameters = item.callspec.params
        key = ("-".join(parameters["target"]), parameters["family"], marker.args[0].format_map(parameters))
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else ""
        outcomes = item.config.stash[OUTCOMES]
        worst = outcomes.get(key, ("passed", ""))
        outcomes[key] = (report.outcome, reason) if worst[0] == "passed" else worst
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Compare the table with what has just been found, if all of it was."""
    config = session.config
    if config.option.keyword or any("::" in argument for argument in config.args):
        return
    outcomes = {}
    for (name, family, item), outcome in config.stash[OUTCOMES].items():
        outcomes.setdefault(name, {}).setdefault(family, {})[item] = outcome
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    new = text
    for name, found in outcomes.items():
        complete = found.keys() == FAMILIES.keys() and all(
            x != "failed" for row in found.values() for x, _ in row.values()
        )
        gpu_skipped = all(reason == "needs a CUDA GPU" for row in found.values() for _, reason in row.values())
        if complete and not gpu_skipped:
            new = replace_section(new, name, render(name, found))
    if new == text:
        return
    # The option is not known where this file was not among the first to be loaded.
    if config.getoption("--write-models-table", default=False):
        TABLE.write_text(new, encoding="utf-8")
    elif not exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.get_terminal_writer().line("docs/models.md is not what the tests found; run with --write-models-table")


def replace_section(text, name, section):
    """Put a target's section in the place of the old one, or at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{section}\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n"


def render(name, found):
    """Return a target's section: a table of families by parts of the contract, and notes."""
    items = list(dict.fromkeys(item for row in found.values() for item in row if item != "refused"))
    notes = []
    lines = [
        f"## {TARGETS[name]}",
        "",
        f"| family | peculiarity | {' | '.join(items)} |",
        f"|---|---|{'---|' * len(items)}",
    ]
    for family_name, family in FAMILIES.items():
        row = found[family_name]
        if "refused" in row:
            cells = ["refused"] * len(items)
        else:
            cells = []
            for item in items:
                outcome, reason = row.get(item, ("", ""))
                if outcome == "skipped":
                    if reason not in notes:
                        notes.append(reason)
                    cells.append(f"no ({notes.index(reason) + 1})")
                else:
                    cells.append("yes" if outcome == "passed" else "")
        lines.append(f"| {family_name} | {family.peculiarity} | {' | '.join(cells)} |")
    refused = [f"- {name}: `{_plain(family.refused)}`" for name, family in FAMILIES.items() if family.refused]
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), "", "Refused, with the message:", "", *refused]
    return "\n".join(lines)


def _plain(pattern):
    return pattern.replace("\\", "")
