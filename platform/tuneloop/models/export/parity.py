"""What the live model answered at the end of training, and whether a server answers the same.

A trained model leaves its answers to a few prompts in `parity.json`. Whoever serves it sends the
same prompts again: what is served has to be what was trained.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tuneloop.errors import EndpointError, ModelError
from tuneloop.models.client.client import Client, RequestError
from tuneloop.records import Completion, Endpoint, Parity, SamplingParams

PARITY_FILE = "parity.json"


@dataclass(frozen=True)
class LiveAnswer:
    """What the trained model, still in memory, answers to one prompt, greedily.

    Args:
        prompt_ids: Shape (T,).
        ids: Shape (G,).
        logprobs: Natural log of each id's probability. Shape (G,).
        margins: Log-probability of the best token minus that of the second. Shape (G,).
        stopped: The last id is a stop token.
    """

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    margins: list[float]
    stopped: bool = False


def widest(gaps: Iterable[float]) -> float:
    """Return the largest gap, 0 without any; not a number where one of them is none."""
    return float(np.max([0.0, *gaps]))


def write_parity(folder: Path, parity: Parity, live: Sequence[LiveAnswer]) -> None:
    """Write `parity.json`: the comparison, and the live model's answers for later ones."""
    content = asdict(parity) | {"answers": [asdict(answer) for answer in live]}
    (folder / PARITY_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def check_served(endpoint: Endpoint, folder: Path) -> Parity | None:
    """Send a server the live model's prompts; None where no answers are recorded.

    Args:
        endpoint: Serves the model; has to take token ids, as ours does.
        folder: The model artifact's directory.

    Raises:
        ModelError: The served model answers differently from the one that was trained.
        EndpointError: The endpoint is unusable, or refuses these prompts.
    """
    file = folder / PARITY_FILE
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    live = [LiveAnswer(**answer) for answer in recorded.get("answers", ())]
    if not live:
        return None
    try:
        served = asyncio.run(_ask(endpoint, live))
    except RequestError as error:
        raise EndpointError.of(
            f"the served model `{endpoint.model}` cannot be compared with the trained one",
            where=endpoint.url,
            got=str(error),
            allowed="a server that takes and returns token ids, with room for "
            f"{max(len(a.prompt_ids) + len(a.ids) for a in live)} tokens",
            remedy="look at the server's log; too little memory leaves too little room",
        ) from error
    parity = compare(live, served, recorded["tolerance"])
    if not parity.passed:
        raise ModelError.of(
            f"the served model `{endpoint.model}` answers differently from the trained one",
            where=f"{endpoint.url}, {file}",
            got=f"log-probabilities differ by up to {parity.max_abs_logprob_diff:.4g}, "
            f"greedy tokens {'are equal' if parity.greedy_equal else 'differ'}",
            allowed=f"{parity.tolerance:g}, and no other tokens than ties",
            remedy="report it with parity.json: what is served is not what was trained",
        )
    return parity


async def _ask(endpoint: Endpoint, live: Sequence[LiveAnswer]) -> list[Completion]:
    async with Client(endpoint) as client:
        return await asyncio.gather(
            *(
                client.complete(
                    answer.prompt_ids, SamplingParams(max_tokens=len(answer.ids), logprobs=True)
                )
                for answer in live
            )
        )


def compare(live: Sequence[LiveAnswer], served: Sequence[Completion], tolerance: float) -> Parity:
    """Compare greedy completions of the same prompts with the live model's answers.

    A live answer may end with its stop token, which a completion leaves out. What follows a
    differing token has another past and is not compared.
    """
    num_tokens, num_different, num_ties = 0, 0, 0
    gaps: list[float] = []
    for answer, completion in zip(live, served, strict=True):
        picks: list[int | None] = [*completion.token_ids]
        if completion.finish_reason == "stop":
            picks.append(None)
        for index, token in enumerate(answer.ids):
            pick = picks[index] if index < len(picks) else -1
            last = index == len(answer.ids) - 1
            ends = pick is None and last and answer.stopped
            num_tokens += 1
            if pick != token and not ends:
                num_different += 1
                num_ties += answer.margins[index] <= 2 * tolerance
                break
            if pick is not None and completion.logprobs is not None:
                gaps.append(abs(completion.logprobs[index] - answer.logprobs[index]))
    worst = widest(gaps)
    return Parity(
        passed=worst <= tolerance and num_different == num_ties,
        prompts=len(live),
        tokens=num_tokens,
        max_abs_logprob_diff=worst,
        greedy_equal=num_different == 0,
        num_ties=num_ties,
        tolerance=tolerance,
        arms={"served": worst},
    )
