"""How `pages` has nbdev treat a notebook; the processes that nbdev starts import this by name."""

import atexit

from IPython.core.interactiveshell import InteractiveShell
from nbdev.process import Processor
from nbdev.processors import FilterDefaults


class EndShell(Processor):
    """Let go of the shell that imported for a notebook: at exit each shell would collect garbage
    through all that torch and transformers hold, four times the work of the pages.
    """

    def end(self):
        "Called when a notebook is done; nbdev makes the instance of IPython a new shell for each."
        if InteractiveShell.initialized():
            atexit.unregister(InteractiveShell.instance().atexit_operations)


class Pages(FilterDefaults):
    "What nbdev does to a notebook, and the end of its shell."

    def xtra_procs(self):
        return [*super().xtra_procs(), EndShell]
