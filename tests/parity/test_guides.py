"""The commands of docs/guides, as they stand there: those that can be run are run, on SmolLM2 and a trained adapter.

`minilora`, `python` and `mlx_lm.generate` run in one folder, page by page. llama.cpp's programs are not installed with
its Python package: its server runs in this process with the model, adapter and context of the command line, and is
asked what `curl` asks. What is not run is listed here, and the pages say so.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import minilora as ml
from tests import tiny
from tests.parity.llama_cpp import xllamacpp

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'minilora[parity]')")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
GUIDES = ROOT / "docs" / "guides"
RUN = {"minilora": ["-m", "minilora"], "python": [], "mlx_lm.generate": ["-m", "mlx_lm", "generate"]}
NOT_RUN = {"ollama", "vllm", "mlx_lm.server"}
PROMPT, COMPLETION = "The capital of France is", "Lyon, the old town on two rivers"


def commands(page: str) -> list[list[str]]:
    """The command lines in the page's blocks of shell, each split into words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (GUIDES / page).read_text("utf-8"), re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def option(words: list[str], *names: str) -> str | None:
    return next((words[place + 1] for place, word in enumerate(words) if word in names), None)


def run(words: list[str], folder: Path) -> str:
    """What the command prints; it has to succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *RUN[words[0]], *words[1:]]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"
    return done.stdout


def llama_server(words: list[str], folder: Path):
    """llama.cpp's server as this command line asks for it, but for the port."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / option(words, "-m"))
    if adapter := option(words, "--lora"):
        loaded = xllamacpp.CommonAdapterLoraInfo()
        loaded.path, loaded.scale = str(folder / adapter), 1.0
        settings.lora_adapters = [loaded]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = int(option(words, "-c") or 2048), 1, 0
    settings.warmup, settings.verbosity = False, 1
    return xllamacpp.Server(settings)


def fetch(words: list[str], address: str) -> dict | list:
    """What `curl` would get, from a server at another address."""
    url = re.sub(r"^http://localhost:\d+", address, words[1])
    data = option(words, "-d")
    request = urllib.request.Request(url, data and data.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


@pytest.fixture
def folder(tmp_path, smollm2_adapter):
    shutil.copytree(smollm2_adapter, tmp_path / "adapter")
    return tmp_path


def test_every_command_is_run_or_known_not_to_be():
    """Guides without other programs have blocks of bash, and are run by tests/docs/test_code_blocks.py."""
    pages = sorted(path.name for path in GUIDES.glob("*.md") if commands(path.name))
    assert pages == ["llama_cpp.md", "mlx.md", "ollama.md", "vllm.md"]
    programs = {words[0] for page in pages for words in commands(page)}
    assert programs == RUN.keys() | NOT_RUN | {"llama-server", "llama-cli", "curl"}


def test_llama_cpp(folder):
    server, completions = None, []
    for words in commands("llama_cpp.md"):
        if words[0] in RUN:
            run(words, folder)
        elif words[0] in ("llama-server", "llama-cli"):
            server = llama_server(words, folder)
            request = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0}
            completions.append(server.handle_completions(request)["choices"][0]["text"])
        else:
            answer = fetch(words, server.listening_address)
            if isinstance(answer, list):
                assert [adapter["path"] for adapter in answer] == [str(folder / "adapter.gguf")]
            else:
                completions.append(answer["choices"][0]["text"])
    assert len(completions) == 4  # two servers, one command line, one request
    for completion in completions:
        assert completion.lstrip().startswith(COMPLETION)


def test_ollama(folder):
    """The files that the Modelfiles name are there and llama.cpp runs them; Ollama itself is not run."""
    for words in commands("ollama.md"):
        if words[0] in RUN:
            run(words, folder)
    modelfiles = re.findall(r"^```modelfile\n(.*?)^```", (GUIDES / "ollama.md").read_text("utf-8"), re.M | re.S)
    assert len(modelfiles) == 2
    for modelfile in modelfiles:
        named = dict(line.split(" ", 1) for line in modelfile.splitlines())
        words = ["llama-server", "-m", named["FROM"], *(["--lora", named["ADAPTER"]] if "ADAPTER" in named else [])]
        request = {
            "prompt": PROMPT,
            "max_tokens": 10,
            "temperature": float(named.get("PARAMETER", "temperature 0").split()[1]),
        }
        answer = llama_server(words, folder).handle_completions(request)
        assert answer["choices"][0]["text"].lstrip().startswith(COMPLETION)


def test_vllm(folder):
    """The folded directory has one rank and one alpha and the logits of the adapter, here one with patterns."""
    model = ml.load_model("smollm2")
    config = ml.LoraConfig(r=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    tiny.add_random_adapter(model, "patterns", config)
    for key, tensor in model.adapter_parameters("patterns").items():
        tensor.data *= 0.05 if "lora_B" in key else 1.0
    model.save_adapter("patterns", folder / "adapter")
    tokens = [model.tokenizer.encode(PROMPT)]
    expected = model.logits(tokens)
    for words in commands("vllm.md"):
        if words[0] in RUN:
            run(words, folder)
    written = json.loads((folder / "folded" / "adapter_config.json").read_text())
    assert (written["rank_pattern"], written["alpha_pattern"], written["use_rslora"]) == ({}, {}, False)
    model.load_adapter("folded", folder / "folded")
    assert tiny.relative_error(model.logits(tokens), expected) < 1e-5
    model.set_adapter(None)
    assert tiny.relative_error(model.logits(tokens), expected) > 0.01
    assert (folder / "merged" / "config.json").exists()


def test_mlx(folder):
    completions = []
    for words in commands("mlx.md"):
        if words[0] in RUN:
            printed = run(words, folder)
            completions += [printed] if words[0] == "mlx_lm.generate" or words[1] == "generate" else []
    assert len(completions) == 3
    for completion in completions:
        assert COMPLETION in completion
