"""Every Python block of ``docs/writing_a_method.md``, as one module, and the methods that it defines."""

import importlib
import re
from pathlib import Path

from modelopt_lite import list_sparse_methods, registry

PAGE = Path(__file__).parents[2] / "docs" / "writing_a_method.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    list_sparse_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    # In a file, because Triton reads the source of hooks.
    (tmp_path / "my_methods.py").write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_methods")
    printed = capsys.readouterr().out
    for name in ("Strided", "Threshold", "Peaks", "SkipByMargin"):
        assert f"{name}(" in printed
    assert printed.count("meets the contract: configuration, plan, rule, ") == 4
    assert "the fast form" not in printed
    assert "what the rule decides" not in printed
