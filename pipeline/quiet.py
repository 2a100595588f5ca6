"""Keeping the libraries' own chatter off the screen: our progress bars and messages say what is going on."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Errors only from transformers and diffusers, unless their own variables say otherwise, and no bars for loading files that
    lie on disk. Call before using them; downloads from the Hub keep their bars."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    # said to the libraries, since peft has imported them by now, and they have read their variables
    for library, variable in ((of_transformers, "TRANSFORMERS_VERBOSITY"), (of_diffusers, "DIFFUSERS_VERBOSITY")):
        if variable not in os.environ:
            library.set_verbosity_error()
        library.disable_progress_bar()
