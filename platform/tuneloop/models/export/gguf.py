"""A model as GGUF files, made by llama.cpp's converter, whose prompts are held against ours.

llama.cpp's packages live in a directory of their own (`llama_cpp/requirements.txt`) and run as
programs: the converter brings another version of the gguf package than transformers needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from tuneloop.errors import ModelError, ResourceError
from tuneloop.models.bases.source import cache_directory
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message

logger = logging.getLogger("tuneloop.models")

KINDS = ("F16", "Q8_0", "Q4_K_M")
_PROGRAMS = Path(__file__).parent / "llama_cpp"


class Agreement(NamedTuple):
    """How llama.cpp reads prompts beside our renderer.

    Args:
        num_prompts: Compared; the text of each was equal byte for byte.
        num_other_ids: Those that llama.cpp's tokenizer cuts into other tokens.
        example: The first of them, shortened.
    """

    num_prompts: int
    num_other_ids: int
    example: str


def llama_cpp() -> Path:
    """Return the directory with llama.cpp's packages, installed at the first use.

    Raises:
        ResourceError: They cannot be installed.
    """
    requirements = _PROGRAMS / "requirements.txt"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(requirements.read_bytes() + version.encode()).hexdigest()[:12]
    folder = cache_directory().parent / f"llama.cpp-{digest}"
    if folder.is_dir():
        return folder
    logger.info("installing llama.cpp's packages in %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="llama.cpp-", dir=folder.parent))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", str(draft), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(draft, ignore_errors=True)
        raise ResourceError.of(
            "llama.cpp's packages cannot be installed",
            where=str(requirements),
            got=(done.stderr.strip().splitlines() or ["no message"])[-1],
            remedy="install them by hand: pip install --no-deps --target "
            f"{folder} -r {requirements}",
        )
    try:
        draft.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def convert(model: Path, folder: Path, name: str) -> dict[str, Path]:
    """Return a model's GGUF files by kind, written to `folder` as `NAME-KIND.gguf`.

    Args:
        model: Directory in Hugging Face layout, with merged weights.

    Raises:
        ModelError: llama.cpp does not know this kind of model.
    """
    files = {kind: folder / f"{name}-{kind}.gguf" for kind in KINDS}
    packages = llama_cpp()
    first = files["F16"]
    arguments = ["--outtype", "f16", "--model-name", name, "--outfile", str(first), str(model)]
    _run(packages, packages / "convert_hf_to_gguf.py", arguments, model)
    for kind in KINDS[1:]:
        _run(packages, _PROGRAMS / "quantize.py", [str(first), str(files[kind]), kind], model)
    return files


def _run(packages: Path, program: Path, arguments: Sequence[str], model: Path) -> None:
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(
        command, env=_environment(packages), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ModelError.of(
            "the model cannot be written as GGUF",
            where=str(model),
            got=(done.stderr.strip().splitlines() or ["no message"])[-1][:500],
            allowed="models that llama.cpp knows, such as Llama, Qwen, Gemma, Mistral, Phi",
            remedy="`--to vllm` writes merged safetensors, which transformers and vLLM read",
        )


def _environment(packages: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(packages), "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def serve_gguf(file: Path, num_slots: int, context: int) -> Iterator[str]:
    """Serve a GGUF by llama.cpp on 127.0.0.1 for the duration of the block.

    Args:
        num_slots: Requests that are answered at once.
        context: Longest prompt and answer together, in tokens.

    Yields:
        Its address; the OpenAI-compatible one ends in `/v1`.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """
    threads = max(1, (os.cpu_count() or 1))
    command = [sys.executable, str(_PROGRAMS / "serve.py"), str(file), str(num_slots)]
    command += [str(context), str(threads)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            env=_environment(llama_cpp()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                log.seek(0)
                raise ModelError.of(
                    "llama.cpp cannot load the file",
                    where=str(file),
                    got=(log.read().strip().splitlines() or ["it ended"])[-1][:500],
                )
            yield address
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def compare_prompts(
    address: str, renderer: Renderer, prompts: Sequence[Sequence[Message]]
) -> Agreement:
    """Return how llama.cpp renders and cuts prompts beside what the model was trained with.

    Raises:
        ModelError: It renders one otherwise: the file would be asked what the model never saw.
    """
    others: list[str] = []
    with httpx.Client(base_url=address, timeout=60) as client:
        for messages in prompts:
            ids = renderer.prompt_ids(messages)
            expected = _text(renderer, ids)
            body = {"messages": [message.as_dict() for message in messages]}
            answer = client.post("/apply-template", json=body)
            text = str(answer.json().get("prompt", answer.text[:300]))
            # Where the template writes BOS and the tokenizer adds it, llama.cpp keeps one.
            asked = {"content": text, "add_special": True, "parse_special": True}
            found = client.post("/tokenize", json=asked).json()["tokens"]
            bos = renderer.tokenizer.bos_token_id
            if bos is not None and found[:2] == [bos, bos]:
                found = found[1:]
            if found == ids:
                continue
            bos_text = renderer.tokenizer.bos_token or ""
            if text.removeprefix(bos_text) != expected.removeprefix(bos_text):
                at = _first_difference(text, expected)
                raise ModelError.of(
                    "llama.cpp renders the chat template otherwise",
                    where=f"the prompt's character {at}",
                    got=repr(text[max(0, at - 40) : at + 40]),
                    allowed=repr(expected[max(0, at - 40) : at + 40]),
                    remedy="train with a plainer template (model.chat_template: chatml), or "
                    "export with `--to vllm`",
                )
            at = _first_difference(found, ids)
            others.append(_text(renderer, ids[max(0, at - 5) : at + 5]))
    return Agreement(len(prompts), len(others), others[0] if others else "")


def _text(renderer: Renderer, ids: Sequence[int]) -> str:
    """Return all that ids say, special tokens included."""
    return str(renderer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _first_difference(left: Sequence[object], right: Sequence[object]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
