"""docs/extend.md: its code runs as it stands and prints what it says, and its LoRA-FA is the one in the package."""

import re
import subprocess
import sys
from pathlib import Path

from minilora.lora.variants import lora_fa

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_code_prints_what_the_page_says():
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks("python"))], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks("text"))


def test_lora_fa_is_shown_as_it_is_and_takes_under_60_lines():
    source = Path(lora_fa.__file__).read_text("utf-8")
    (shown,) = (block for block in blocks("python") if "class LoraFaLayer" in block)
    assert source[source.index("class LoraFaLayer") :] == shown[shown.index("class LoraFaLayer") :]
    assert len(source.splitlines()) < 60
