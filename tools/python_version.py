"""End with a sentence if this Python is too old for the package; runs on any Python 3."""

import sys

if sys.version_info < (3, 11):
    sys.exit("higgs_nb needs Python 3.11 or newer, found " + sys.version)
