"""Keeping the libraries' own chatter off the screen: our progress bars and messages say what is going on."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Errors only from transformers and diffusers, and no bars for loading files that lie on disk. Call before using them;
    downloads from the Hub keep their bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
