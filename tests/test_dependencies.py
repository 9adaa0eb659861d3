"""What the package asks for is what it imports, and what is installed fits together: the audit that needs no network.

`make audit` asks PyPI for known vulnerabilities of what is installed; it needs a network, and is no part of `make test`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import paratrain

PACKAGE = Path(paratrain.__file__).parent
OPTIONAL = {  # imported where a user asked for it, and named there when it is missing
    "deepspeed", "fairscale", "fsspec", "datasets", "pyarrow", "torchao", "omegaconf", "yaml",
}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top-level packages that the library imports, anywhere in its files."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"paratrain"}


def declared() -> set[str]:
    """Names of distributions that an installation without extras brings."""
    return {normal(re.split(r"[\s;<>=!~\[]", text)[0]) for text in requires("paratrain") or [] if "extra ==" not in text}


def test_nothing_is_imported_that_is_not_asked_for_and_the_reverse():
    owners = packages_distributions()
    needed = {normal(owner) for name in imported() - OPTIONAL for owner in owners.get(name, [name])}
    assert needed - declared() == set()
    assert declared() - needed == set()


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    ours = [line for line in done.stdout.splitlines() if line.startswith("paratrain ")]
    assert ours == []
