"""A finetuned model as files to take home, and what each smaller file costs in points.

Formats: GGUF in three sizes for llama.cpp, the same with a Modelfile for Ollama, merged safetensors
for vLLM and transformers, and those as a repository on the Hugging Face Hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tuneloop.artifacts import Artifact, Workspace, sha256_file
from tuneloop.config import ArmConfig, EvaluationConfig, TuneloopConfig
from tuneloop.data.decontamination.seen import datasets_of
from tuneloop.errors import ArtifactError, ConfigError, ModelError
from tuneloop.evals.scoring.metrics import MetricKind
from tuneloop.evals.scoring.questions import Question, read_questions
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.client.client import Client, ask_each
from tuneloop.models.client.streaming import RequestError
from tuneloop.models.export.gguf import KINDS, compare_prompts, convert, serve_gguf
from tuneloop.models.export.ollama import modelfile
from tuneloop.pipeline import evaluate_named
from tuneloop.records import Endpoint, SamplingParams

logger = logging.getLogger("tuneloop.export")

CODE_VERSION = 4
MODEL = "the model"
MARKER = "export.json"
_DRAFT = ".draft"  # the folder is ours, and not whole
NUM_SLOTS = 4
NUM_COMPARED = 50
NUM_TIMED = 8
# What a model artifact says about its training stays at home.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
_LEFT_OUT = ("artifact.json", "parity.json", "log.txt", "tuneloop_render.json")


class Measured(NamedTuple):
    """A number with its interval, which very few rows do not give."""

    value: float
    low: float | None
    high: float | None


class PriceTag(NamedTuple):
    """What one file does on the test rows beside the model it was made from.

    Args:
        score: In the primary metric, with its interval.
        difference: To the model on the same rows, with its interval; 0 for the model itself.
        tokens_per_s: Of one request at a time, prompt included, on this machine; None for the
            model, which another engine serves.
    """

    name: str
    score: Measured
    difference: Measured
    tokens_per_s: float | None


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares.

    Args:
        folder: Where the files are.
        sizes: Bytes of each file that holds weights.
        notes: What whoever runs the files should know.
        metric: That the price tags are in; "" without price tags.
        metric_kind: As in `Metric`.
        reused: The same files were there.
    """

    model: str
    folder: Path
    sizes: dict[str, int]
    notes: list[str]
    metric: str
    price_tags: list[PriceTag]
    metric_kind: MetricKind = "ratio"
    reused: bool = False

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        metrics = {
            "files": self.sizes,
            "notes": self.notes,
            "metric": self.metric,
            "metric_kind": self.metric_kind,
            "price_tags": [
                tag._asdict()
                | {"score": tag.score._asdict(), "difference": tag.difference._asdict()}
                for tag in self.price_tags
            ],
        }
        return {
            "artifact": self.model,
            "path": str(self.folder),
            "reused": self.reused,
            "metrics": metrics,
        }


def export(
    workspace: Workspace,
    reference: str,
    to: str,
    folder: Path,
    config: TuneloopConfig | None = None,
) -> Export:
    """Write a model artifact in another format; the same export again is looked up.

    Args:
        reference: Such as `models/faq@v2`.
        to: `gguf`, `ollama`, `vllm`, or `hub`, which writes the folder that `push` sends.
        folder: Where to; made if it is not there.
        config: Says how answers are scored. With it, GGUF files get price tags.

    Raises:
        ArtifactError: No such model, or its dataset is gone and price tags are asked for.
        ConfigError: The folder holds something else.
        ModelError: The model or its template cannot be expressed in this format.
    """
    model = _model(workspace, reference)
    is_gguf = to in ("gguf", "ollama")
    scoring = _as_asked(config.evaluation) if config and is_gguf else None
    identity = {
        "code_version": CODE_VERSION,
        "model": model.ref,
        "fingerprint": model.fingerprint,
        "to": to,
        # Without defaults: a key that a later version adds makes no other export of this one.
        "evaluation": scoring.model_dump(mode="json", exclude_defaults=True) if scoring else None,
    }
    if found := _read(folder, identity):
        return found
    dataset = _dataset(workspace, model, is_needed=scoring is not None)
    rows = _questions(dataset) if dataset else []
    questions = [row for row in rows if row.messages and not row.tools]
    unasked = _unasked(rows) if scoring else ""
    if unasked:
        scoring = None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DRAFT).touch()
    tags: list[PriceTag] = []
    notes: list[str] = []
    metric = ""
    kind: MetricKind = "ratio"
    if is_gguf:
        try:
            files, answers, speeds, notes = _write_gguf(model, to, folder, questions, scoring)
        except ModelError:
            _remove_gguf(folder, model.name)
            raise
        if unasked:
            notes.append(f"no price tags: {unasked}")
        if config and scoring and dataset and answers:
            named = _with_arms(config, scoring, model, answers)
            name = f"{config.name}-export"
            published = evaluate_named(named, workspace, name, rows=dataset)
            result = Evaluation.load(published.artifact)
            metric, tags = result.primary, _price_tags(result, speeds)
            kind = result.metric(metric).kind
            notes += [
                f"{len(questions)} test rows, which the model and each file answered once, "
                f"greedily: {published.artifact.ref}",
                "tokens/s of one request at a time, prompt included, beside whatever else ran here",
            ]
    else:
        files = _write_safetensors(model, folder)
    written = Export(
        model.ref, folder, {f.name: f.stat().st_size for f in files}, notes, metric, tags, kind
    )
    checksums = {file.name: sha256_file(file) for file in files}
    marker = {**identity, "checksums": checksums, "export": written.summary()["metrics"]}
    draft = folder / f".{MARKER}"
    draft.write_text(json.dumps(marker, ensure_ascii=False, indent=1), encoding="utf-8")
    draft.replace(folder / MARKER)
    (folder / _DRAFT).unlink()
    return written


def push(result: Export, repository: str) -> str:
    """Send a folder to the Hugging Face Hub, as a private repository, and return its address.

    Raises:
        ConfigError: The Hub refuses.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=result.folder,
            repo_id=repository,
            commit_message=f"{result.model}, exported by tuneloop",
            ignore_patterns=[MARKER, _DRAFT],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError.of(
            "the Hugging Face Hub does not take the model",
            where=f"--repo {repository}",
            got=str(error).strip().splitlines()[0],
            remedy="set HF_TOKEN to a token that may write there; the folder stays in "
            f"{result.folder}",
        ) from error
    return str(url)


def _model(workspace: Workspace, reference: str) -> Artifact:
    artifact = workspace.open(reference)
    if artifact.kind != "models":
        raise ArtifactError.of(
            "only models are exported",
            where="REF",
            got=artifact.ref,
            allowed="models/NAME (newest) or models/NAME@vN",
        )
    return artifact


def _read(folder: Path, identity: dict[str, Any]) -> Export | None:
    """Return the export that a folder holds already, or None.

    Raises:
        ConfigError: It holds something else, which is not overwritten.
    """
    marker = folder / MARKER
    if not marker.is_file():
        # What a killed export left has our names and no marker.
        foreign = [f.name for f in folder.iterdir()] if folder.is_dir() else []
        if foreign and not (folder / _DRAFT).exists():
            raise ConfigError.of(
                "the folder holds other files",
                where=f"--output {folder}",
                got=", ".join(sorted(foreign)[:5]),
                allowed="a folder that is empty or not there yet",
            )
        return None
    found = json.loads(marker.read_text(encoding="utf-8"))
    differing = [key for key, value in identity.items() if found.get(key) != value]
    if differing:
        scored = ", scored otherwise" if differing == ["evaluation"] else ""
        raise ConfigError.of(
            "the folder holds another export",
            where=f"--output {folder}",
            got=f"{found.get('model')} as {found.get('to')}{scored}",
            allowed="the same model and format, scored alike, by this version of tuneloop",
            remedy="name another folder, or remove this one",
        )
    files = {name: folder / name for name in found["checksums"]}
    if any(
        not file.is_file() or sha256_file(file) != found["checksums"][name]
        for name, file in files.items()
    ):
        return None
    metrics = found["export"]
    tags = [
        PriceTag(**t | {key: Measured(**t[key]) for key in ("score", "difference")})
        for t in metrics["price_tags"]
    ]
    return Export(
        str(found["model"]), folder, metrics["files"], metrics["notes"], metrics["metric"], tags,
        metrics.get("metric_kind", "ratio"), reused=True,
    )  # fmt: skip


def _dataset(workspace: Workspace, model: Artifact, is_needed: bool) -> Artifact | None:
    """Return the dataset a model was trained on; None where it is gone."""
    found = datasets_of(workspace, model.path)
    if is_needed and not found:
        raise ArtifactError.of(
            "the dataset that the model was trained on is gone, so nothing can be scored",
            where=model.ref,
            remedy="leave CONFIG.yaml out: the files are then written without price tags",
        )
    return found[0] if found else None


def _questions(dataset: Artifact) -> list[Question]:
    """Return all test rows."""
    tasks = list(dataset.manifest["config"]["task"].get("tasks") or ())
    return read_questions(dataset, tasks)


def _unasked(rows: Sequence[Question]) -> str:
    """Return which test rows no file is asked; empty: each is asked all.

    The model is scored on all rows, so a file that is asked fewer would have another test.
    """
    with_tools = sum(bool(row.tools) for row in rows)
    texts = sum(not row.messages for row in rows)
    if with_tools:
        return f"{with_tools} of {len(rows)} test rows offer tools, which no file is asked here"
    if texts:
        return f"{texts} of {len(rows)} test rows are plain text, which is not answered"
    return ""


def _as_asked(evaluation: EvaluationConfig) -> EvaluationConfig:
    """Return how the model and the files are scored: greedily, on the test rows, all alike."""
    update: dict[str, Any] = {
        "arms": {},
        "sources": [],
        "floors": [],
        "judge": None,
        "forgetting": None,
        "split": "test",
        "temperature": 0.0,
        "num_samples": 1,
    }
    return evaluation.model_copy(update=update)


class _Written(NamedTuple):
    """GGUF files, each kind's answers and tokens per second where they were asked, and notes."""

    files: list[Path]
    answers: dict[str, Path]
    speeds: dict[str, float]
    notes: list[str]


def _write_gguf(
    model: Artifact,
    to: str,
    folder: Path,
    questions: Sequence[Question],
    scoring: EvaluationConfig | None,
) -> _Written:
    """Write the GGUF files and compare prompts; with `scoring`, answer the questions by each."""
    renderer = Renderer.load(model.path)
    longest = max((len(renderer.prompt_ids(q.messages)) for q in questions), default=1024)
    max_tokens = scoring.max_tokens if scoring else 256
    context = -(-(longest + max_tokens) // 256) * 256
    name = model.name
    if to == "ollama":
        text = modelfile(renderer, f"{name}-Q8_0.gguf", _instruction(questions), context)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    logger.info("writing %s", ", ".join(KINDS))
    files = convert(model.path, folder, name)
    answers: dict[str, Path] = {}
    speeds: dict[str, float] = {}
    notes: list[str] = []
    asked = list(questions) if scoring else []
    for kind, file in files.items():
        if kind != "F16" and not asked:
            continue
        with serve_gguf(file, NUM_SLOTS, context) as address:
            if kind == "F16":
                prompts = [q.messages for q in questions[:NUM_COMPARED]]
                agreement = compare_prompts(address, renderer, prompts)
                notes.append(
                    f"llama.cpp renders {agreement.num_prompts} test prompts byte for byte as in "
                    "training"
                    if prompts
                    else "no prompt was held against llama.cpp's: no test row is free of tools"
                )
                if agreement.num_other_ids:
                    notes.append(
                        f"its tokenizer cuts {agreement.num_other_ids} of them into other tokens, "
                        f"for example at {agreement.example!r}"
                    )
            if asked:
                logger.info("llama.cpp answers %d test rows with %s", len(asked), file.name)
                answers[kind] = folder / f"answers-{kind}.jsonl"
                speeds[kind] = asyncio.run(_answer(address, asked, max_tokens, answers[kind]))
    return _Written(list(files.values()), answers, speeds, notes)


def _remove_gguf(folder: Path, name: str) -> None:
    """Remove what `_write_gguf` writes: nobody is to run a file that was found to be wrong.

    What else is there is not ours: people may use the folder of an export that was killed.
    """
    names = [f"{name}-{kind}.gguf" for kind in KINDS]
    names += [f"answers-{kind}.jsonl" for kind in KINDS]
    for file in (*names, "Modelfile", MARKER, _DRAFT):
        (folder / file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def _instruction(questions: Sequence[Question]) -> str:
    """Return the system message that all questions have; empty if they have none, or several."""
    firsts = (question.messages[0] for question in questions)
    systems = {one.text if one.role == "system" else "" for one in firsts}
    return systems.pop() if len(systems) == 1 else ""


async def _answer(
    address: str, questions: Sequence[Question], max_tokens: int, file: Path
) -> float:
    """Write greedy answers to a file, and return the tokens per second of one request at a time."""
    params = SamplingParams(max_tokens=max_tokens)
    texts: dict[str, str] = {}
    num_tokens = 0
    seconds = 0.0
    async with Client(Endpoint(f"{address}/v1", "exported")) as client:

        async def ask(question: Question) -> None:
            nonlocal num_tokens, seconds
            try:
                answer = await client.generate(question.messages, params)
            except RequestError as error:
                logger.warning("%s was not answered: %s", question.example_id, error)
                return
            texts[question.example_id] = answer.text
            num_tokens += answer.completion_tokens or 0
            seconds += answer.latency_s

        await ask_each(questions[:NUM_TIMED], 1, ask)
        speed = num_tokens / seconds if seconds else 0.0
        await ask_each(questions[NUM_TIMED:], NUM_SLOTS, ask)
    lines = (
        json.dumps({"example_id": key, "completion": text}, ensure_ascii=False)
        for key, text in texts.items()
    )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return speed


def _with_arms(
    config: TuneloopConfig, scoring: EvaluationConfig, model: Artifact, answers: dict[str, Path]
) -> TuneloopConfig:
    """Return the configuration of an evaluation of the model beside each file's answers."""
    arms = {kind: ArmConfig(answers=str(file)) for kind, file in answers.items()}
    update = {"arms": {MODEL: ArmConfig(model=model.ref), **arms}}
    return config.model_copy(update={"evaluation": scoring.model_copy(update=update)})


def _price_tags(result: Evaluation, speeds: dict[str, float]) -> list[PriceTag]:
    """Return how each arm of an evaluation does in the primary metric."""
    pairs = {
        pair["arm"]: pair["differences"][result.primary]
        for pair in result.comparison["pairs"]
        if pair["other"] == MODEL
    }
    tags = []
    for arm in result.arms:
        score = arm["scores"][result.primary]
        pair = pairs.get(arm["name"], {"value": 0.0, "low": 0.0, "high": 0.0})
        tags.append(
            PriceTag(
                arm["name"],
                Measured(score["value"], score["low"], score["high"]),
                Measured(pair["value"], pair["low"], pair["high"]),
                speeds.get(arm["name"]),
            )
        )
    return tags


def _write_safetensors(model: Artifact, folder: Path) -> list[Path]:
    """Copy the merged weights with tokenizer, template and card."""
    names = {f.name for pattern in _MODEL_FILES for f in model.path.glob(pattern)}
    names -= set(_LEFT_OUT)
    for name in sorted(names):
        shutil.copyfile(model.path / name, folder / name)
    return [folder / name for name in sorted(names) if name.endswith(".safetensors")]
