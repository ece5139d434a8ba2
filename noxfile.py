"""The everyday commands, each in an environment of its own: ``nox -l`` lists them, ``nox -s tests`` runs one.

``bash .ci/run`` is everything that has to pass; it does not need nox.
"""

from pathlib import Path

import nox

nox.options.sessions = ["lint"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, extras: str) -> None:
    """Install the package with the tested versions of everything."""
    session.install("-c", "constraints.txt", "-e", f".[{extras}]")


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, check layers and types; seconds, once installed."""
    install(session, "test")
    session.run("ruff", "format")
    session.run("ruff", "check", "--fix")
    session.run("lint-imports")
    session.run("mypy")


@nox.session(python=["3.10", "3.11", "3.12"])
def tests(session: nox.Session) -> None:
    """Run tests; arguments after -- go to pytest: nox -s tests-3.12 -- tests/unit -n 0."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build/html."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def release(session: nox.Session) -> None:
    """Build wheel and sdist in dist/, and try both in an environment without the checkout."""
    session.install("build")
    session.run("python", "-m", "build")
    for pattern in ("*.whl", "*.tar.gz"):
        (package,) = Path("dist").glob(pattern)
        session.install("-c", "constraints.txt", f"{package}[demo]")
        session.install("--force-reinstall", "--no-deps", str(package))
        session.run("modelopt-lite", "run", "quickstart", "--dry-run")


@nox.session
def schemas(session: nox.Session) -> None:
    """Write the JSON schemas again, after a change of a configuration's fields."""
    install(session, "test")
    for what in ("sparsity", "experiment"):
        with open(f"modelopt_lite/schemas/{what}.json", "w", encoding="utf-8") as file:
            session.run("modelopt-lite", "schema", what, stdout=file)
