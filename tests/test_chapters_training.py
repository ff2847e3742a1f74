"The chapters of some floors, see `chapters.GROUPS`."

import pytest
from chapters import GROUPS, chapters, run_chapter


@pytest.mark.parametrize("notebook", chapters(*GROUPS["test_chapters_training"]))
def test_chapter(notebook, tmp_path):
    run_chapter(notebook, tmp_path)
