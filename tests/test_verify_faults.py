"""Every fault of the corpus is found, and explained by its cause."""

from __future__ import annotations

import pytest
from faults.corpus import ANY, CORPUS


@pytest.mark.parametrize("fault", CORPUS, ids=lambda fault: fault.name)
def test_found_and_explained(fault):
    report = fault.verify()
    assert not report.ok
    assert report.first_difference, report.text()
    assert fault.error in (report.first_difference.error, ANY), report.text()
    assert fault.says in report.explanation, report.text()
