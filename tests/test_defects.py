"""What `make defects` would put back is still there to be replaced: it takes minutes, and code moves on."""

from __future__ import annotations

import pytest
from defects import DEFECTS, Defect
from project import REPOSITORY


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.what)
def test_the_code_of_a_defect_stands_once_in_its_file(defect: Defect) -> None:
    assert (REPOSITORY / defect.file).read_text(encoding="utf-8").count(defect.right) == 1
    file, name = defect.test.split("::")
    assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
