"A tiny codec of the released class for tests, which is saved as a folder."

import pytest

from higgs_nb.data.higgs_codec import _require_torchaudio, tiny_higgs_codec

__all__ = ["needs_torchaudio", "tiny_higgs_codec"]

try:
    _require_torchaudio()
    MISSING = ""
except ImportError as error:
    MISSING = str(error).splitlines()[0]

needs_torchaudio = pytest.mark.skipif(
    bool(MISSING), reason=f"{MISSING} (`make test` installs it where there is a network)"
)
