"""Importing the package needs numpy and loads nothing else that is heavy."""

import subprocess
import sys

HEAVY = ["torch", "scipy", "matplotlib", "hypothesis", "pandas", "ssl", "argparse"]


def test_import_is_light():
    code = (
        "import sys, numpy; before = set(sys.modules); import bs_patterns;"
        f"print(sorted((set(sys.modules) - before) & set({HEAVY})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_and_exports():
    import bs_patterns

    assert bs_patterns.__version__ == "0.1.0"
    assert all(hasattr(bs_patterns, name) for name in bs_patterns.__all__)
