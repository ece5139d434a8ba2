"""A pytest plugin that keeps docs/models.md: its tables are written from what passed.

The process that hears of all tests does so, whichever process ran them.
"""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from families import FAMILIES

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
TARGETS = {
    "torch-cpu": "PyTorch backend on a CPU",
    "triton-cuda": "Triton kernels on a GPU",
}
MADE_WITH = re.compile(r"^Made with [^*]*\. ", re.MULTILINE)


def pytest_addoption(parser):
    parser.addoption(
        "--write-models-table", action="store_true", help="write docs/models.md from what passed, instead of comparing"
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # which the processes of pytest-xdist have
        config.pluginmanager.register(ModelsTable(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("contract")
    if marker is not None and (report.when == "call" or report.outcome == "skipped"):
        parameters = item.callspec.params
        part = marker.args[0].format_map(parameters)
        place = item.session.items.index(item)
        report.user_properties.append(("contract", (place, "-".join(parameters["target"]), parameters["family"], part)))
    return report


class ModelsTable:
    """Compares the table with what has just been found, if all of it was, or writes it."""

    def __init__(self, config):
        self.config = config
        self.found = []

    def pytest_runtest_logreport(self, report):
        for name, found in report.user_properties:
            if name == "contract":
                reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else ""
                self.found.append((*found, report.outcome, reason))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        config = self.config
        if not self.found or config.option.keyword or any("::" in argument for argument in config.args):
            return
        outcomes = {}
        for _, name, family, part, *outcome in sorted(self.found):  # tests end in any order
            row = outcomes.setdefault(name, {}).setdefault(family, {})
            if row.get(part, ("passed", ""))[0] == "passed":
                row[part] = tuple(outcome)
        text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
        new = text
        for name, found in outcomes.items():
            complete = found.keys() == FAMILIES.keys() and all(
                x != "failed" for row in found.values() for x, _ in row.values()
            )
            gpu_skipped = all(reason == "needs a CUDA GPU" for row in found.values() for _, reason in row.values())
            if complete and not gpu_skipped:
                new = replace_section(new, name, render(name, found))
        if config.option.write_models_table:
            TABLE.write_text(new, encoding="utf-8")
        elif not exitstatus and MADE_WITH.sub("", new) != MADE_WITH.sub("", text):  # other versions may find the same
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            line = "docs/models.md is not what the tests found; run with --write-models-table"
            config.get_terminal_writer().line(line)


def replace_section(text, name, section):
    """Put a target's section in the place of the old one, or at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{section}\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n"


def render(name, found):
    """Return a target's section: for each family what passed, of the parts of the contract, and notes."""
    items = list(dict.fromkeys(item for row in found.values() for item in row if item != "refused"))
    notes = []
    lines = [
        f"## {TARGETS[name]}",
        "",
        f"Made with PyTorch {_minor_version('torch')} and Transformers {_minor_version('transformers')}. *All* is: "
        f"{'; '.join(items)}.",
        "",
        "| family | peculiarity | passed | does not work |",
        "|---|---|---|---|",
    ]
    for family_name, family in FAMILIES.items():
        row = found[family_name]
        passed = [item for item in items if row.get(item, ("",))[0] == "passed"]
        skipped = [(item, row[item][1]) for item in items if row.get(item, ("",))[0] == "skipped"]
        for _, reason in skipped:
            if reason not in notes:
                notes.append(reason)
        is_whole = len(passed) + len(skipped) == len(items)
        what = "refused" if "refused" in row else "all" if passed == items else "all others" if is_whole else ""
        exceptions = "; ".join(f"{item} ({notes.index(reason) + 1})" for item, reason in skipped)
        lines.append(f"| {family_name} | {family.peculiarity} | {what or '; '.join(passed)} | {exceptions} |")
    refused = [f"- {name}: `{_plain(family.refused)}`" for name, family in FAMILIES.items() if family.refused]
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), "", "Refused, with the message:", "", *refused]
    return "\n".join(lines)


def _minor_version(package):
    return ".".join(version(package).split(".")[:2])


def _plain(pattern):
    return pattern.replace("\\", "")
