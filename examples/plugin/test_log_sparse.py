"""The method meets the contract; run it once the package is installed."""

import modelopt_lite as mtsa
from modelopt_lite.testing import check_method


def test_contract() -> None:
    """Installed, the method is found by its name, and does what every kernel relies on."""
    check_method(mtsa.get_sparse_method("log_sparse"))
