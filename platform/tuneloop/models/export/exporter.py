"""A trained model as files anyone can load, and proof that the files answer as the live model did.

Shape legend: T tokens, G generated tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from tuneloop.errors import ModelError
from tuneloop.models.attention import attends_packed, keeps_logits, standard_attention
from tuneloop.models.bases.weights import load_whole
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.layout import ADAPTER, RENDER_FILE
from tuneloop.models.export.parity import LiveAnswer, widest, write_parity
from tuneloop.records import Parity

NUM_TOKENS = 24
_MAX_PROMPT_TOKENS = 256
# Largest difference of a log-probability (natural log) that rounding explains.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def parity_prompt(ids: NDArray[np.int32], loss_mask: NDArray[np.int8]) -> list[int]:
    """Return a prompt to compare models on: the tokens before a row's first target.

    Args:
        ids: Shape (T,).
        loss_mask: Shape (T,).
    """
    first = next((index for index, bit in enumerate(loss_mask) if bit), len(ids))
    cut = first if first > 1 else max(1, len(ids) // 2)
    return [int(token) for token in ids[:cut]][-_MAX_PROMPT_TOKENS:]


@dataclass(frozen=True)
class Exporter:
    """Writes a trained model in Hugging Face layout and checks it.

    Args:
        base: Directory of the base model.
        base_name: As the user wrote it; goes into the adapter's configuration.
        renderer: Tokenizer and template that the rows were rendered with.
        output: Directory that becomes the model artifact.
        dtype: The training's; the exports have the same.
        four_bit: The base was held in 4 bits; adapters are merged into the values of those 4 bits,
            because the adapters were trained on them.
    """

    base: Path
    base_name: str
    renderer: Renderer
    output: Path
    dtype: torch.dtype
    four_bit: bool = False

    def answer(
        self,
        model: PreTrainedModel | PeftModel,
        prompts: list[list[int]],
        num_tokens: int = NUM_TOKENS,
    ) -> list[LiveAnswer]:
        """Return the live model's greedy answers. With ZeRO-3 all workers call it together.

        Args:
            num_tokens: Longest answer; shorter where the model's positions end.
        """
        plain = _plain(model)
        packed = attends_packed(plain)
        pad = self._pad_id()
        width = max(len(prompt) for prompt in prompts)
        positions = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
        count = num_tokens if positions is None else max(1, min(num_tokens, positions - width))
        with standard_attention(plain), self._greedy(plain), torch.no_grad():
            device = next(plain.parameters()).device
            answers = []
            # Not every family computes the same behind padding.
            for batch in [prompts] if packed else [[prompt] for prompt in prompts]:
                width = max(len(prompt) for prompt in batch)
                ids = torch.full((len(batch), width), pad, device=device)
                mask = torch.zeros_like(ids)
                for row, prompt in enumerate(batch):
                    ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
                    mask[row, width - len(prompt) :] = 1
                output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count)
                answers += [
                    _score(model, prompt, self._until_stop(output[row, width:].tolist()))[0]
                    for row, prompt in enumerate(batch)
                ]
        stop_ids = self.renderer.stop_ids
        return [replace(answer, stopped=answer.ids[-1] in stop_ids) for answer in answers]

    def save(self, model: PreTrainedModel | PeftModel) -> None:
        """Write adapter, merged weights, tokenizer, template and generation settings.

        Rank 0 calls it, with all parameters whole.
        """
        if model is _plain(model):
            weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
            with _portable_config(model):
                model.save_pretrained(str(self.output), state_dict=weights)
            del weights
        else:
            model.save_pretrained(str(self.output / ADAPTER), save_embedding_layers=False)
            (self.output / ADAPTER / "README.md").unlink(missing_ok=True)
            self._name_base()
            merged = self._load_adapter(dequantized=True).merge_and_unload(safe_merge=True)
            with _portable_config(merged):
                merged.save_pretrained(str(self.output))
        self._save_generation_config()
        self.renderer.save(self.output)
        described = {
            "renderer_hash": self.renderer.hash,
            "stop_ids": list(self.renderer.stop_ids),
            "chat_template": self.renderer.template,
        }
        (self.output / RENDER_FILE).write_text(
            json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8"
        )

    def check(self, live: list[LiveAnswer]) -> Parity:
        """Reload the exports, compare them with the live answers and write `parity.json`.

        Raises:
            ModelError: An export differs from the live model, or renders differently.
        """
        reloaded = Renderer.load(self.output)
        if reloaded.hash != self.renderer.hash:
            raise ModelError.of(
                "the exported tokenizer or template renders differently",
                where=str(self.output),
                got=reloaded.hash,
                allowed=self.renderer.hash,
            )
        tolerance = _TOLERANCE[self.dtype]
        arms: dict[str, float] = {}
        num_different = num_ties = 0
        with torch.no_grad():
            for name, load in (("adapter", self._load_adapter), ("merged", self._load_merged)):
                if name == "adapter" and not (self.output / ADAPTER).is_dir():
                    continue
                model = load()
                gaps: list[float] = []
                for answer in live:
                    again, picks = _score(model, answer.prompt_ids, answer.ids)
                    pairs = zip(answer.logprobs, again.logprobs, strict=True)
                    gaps += [abs(a - b) for a, b in pairs]
                    for pick, token, margin in zip(picks, answer.ids, answer.margins, strict=True):
                        num_different += pick != token
                        num_ties += pick != token and margin <= 2 * tolerance
                arms[name] = widest(gaps)
        worst = widest(arms.values())
        parity = Parity(
            passed=worst <= tolerance and num_different == num_ties,
            prompts=len(live),
            tokens=sum(len(answer.ids) for answer in live),
            max_abs_logprob_diff=worst,
            greedy_equal=num_different == 0,
            num_ties=num_ties,
            tolerance=tolerance,
            arms=arms,
        )
        write_parity(self.output, parity, live)
        if not parity.passed:
            raise ModelError.of(
                "an exported model answers differently from the one that was trained",
                where=str(self.output),
                got=f"log-probabilities differ by up to {worst:.4g}, "
                f"{num_different} of {parity.tokens} greedy tokens differ",
                allowed=f"{tolerance:g}, and no other tokens than ties",
                remedy="report it with parity.json: the export would not be what was trained",
            )
        return parity

    def _load_adapter(self, dequantized: bool = False) -> PeftModel:
        base = self._load(self.base, self.four_bit)
        if self.four_bit and dequantized:
            base = base.dequantize().to(self.dtype)
        return PeftModel.from_pretrained(base, str(self.output / ADAPTER)).eval()

    def _load_merged(self) -> PreTrainedModel:
        return self._load(self.output)

    def _load(self, path: Path, four_bit: bool = False) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": self.dtype}
        if four_bit:
            options["quantization_config"] = four_bits(self.dtype)
        return load_whole(path, **options).eval()

    def _name_base(self) -> None:
        """Write the base's name instead of a path in this machine's cache."""
        file = self.output / ADAPTER / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = self.base_name
        file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")

    def _save_generation_config(self) -> None:
        settings = {k: v for k, v in self._generation_settings().items() if v is not None}
        text = json.dumps(settings, indent=2)
        (self.output / "generation_config.json").write_text(text + "\n", encoding="utf-8")

    def _generation_settings(self) -> dict[str, Any]:
        """State every setting that a library would otherwise fill in: plain greedy decoding."""
        return {
            "bos_token_id": self.renderer.tokenizer.bos_token_id,
            "do_sample": False,
            "eos_token_id": list(self.renderer.stop_ids),
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "pad_token_id": self._pad_id(),
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_p": 1.0,
        }

    def _pad_id(self) -> int:
        pad = self.renderer.tokenizer.pad_token_id
        return self.renderer.stop_ids[0] if pad is None else int(pad)

    def _until_stop(self, ids: list[int]) -> list[int]:
        """Return ids up to and with the first stop token; what follows is padding."""
        stop = next((i for i, token in enumerate(ids) if token in self.renderer.stop_ids), None)
        return ids if stop is None else ids[: stop + 1]

    @contextlib.contextmanager
    def _greedy(self, plain: PreTrainedModel) -> Iterator[None]:
        """Replace the base's own settings, which `generate` merges into what it is given."""
        before = plain.generation_config
        plain.generation_config = GenerationConfig(**self._generation_settings())
        text = plain.config.get_text_config()
        use_cache, text.use_cache = getattr(text, "use_cache", True), True
        try:
            yield
        finally:
            plain.generation_config, text.use_cache = before, use_cache


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4, twice quantized.

    Needs bitsandbytes.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _score(
    model: PreTrainedModel | PeftModel, prompt: list[int], ids: list[int]
) -> tuple[LiveAnswer, list[int]]:
    """Return log-probabilities of given ids after a prompt, and the greedy picks there.

    Equal picks at every position mean equal greedy decoding: each pick has the same past.
    """
    device = next(model.parameters()).device
    sequence = torch.tensor([prompt + ids[:-1]], device=device)
    options = {"logits_to_keep": len(ids)} if keeps_logits(model) else {}
    logits = model(input_ids=sequence, use_cache=False, **options).logits[0, -len(ids) :]
    logprobs = logits.float().log_softmax(-1)  # (G, V)
    best = logprobs.topk(2, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=device)[:, None])[:, 0]
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    return LiveAnswer(prompt, ids, chosen.tolist(), margins), best.indices[:, 0].tolist()


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the Hugging Face model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def _portable_config(model: PreTrainedModel) -> Iterator[None]:
    """Save a configuration that names nothing of ours and lets the cache be used."""
    text = model.config.get_text_config()
    before, text.use_cache = getattr(text, "use_cache", True), True
    # `save_pretrained` refuses a base's inconsistent settings; ours are written afterwards.
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        text.use_cache = before
        model.generation_config = generation
