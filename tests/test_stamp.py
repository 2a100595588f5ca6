"""The page is drawn again when what it shows, or compares with, is another; and only then."""

from __future__ import annotations

from project import Project, commit

from pipeline.page.stamp import PAGE, is_fresh, stamped
from pipeline.workspace import Workspace


def test_the_page_is_stale_after_a_setting_a_result_or_a_commit(project: Project) -> None:
    workspace = Workspace(project.root, project.root)

    def draw() -> None:
        project.path("reports").mkdir(exist_ok=True)
        project.path(str(PAGE)).write_text(stamped(workspace, "<html></html>\n"))

    assert not is_fresh(workspace)
    draw()
    assert is_fresh(workspace)
    project.set("train", steps=7)
    assert not is_fresh(workspace)
    draw()
    project.path("dvc.lock").write_text("stages: {}\n")
    assert not is_fresh(workspace)
    draw()
    commit(project.root)
    assert not is_fresh(workspace)
    draw()
    assert is_fresh(workspace)
