"""The other side of `glue_peers`: transformers with torch's AdamW, galore-torch's, or peft's LoRA.

    PYTHON benchmarks/peer_glue.py FOLDER

FOLDER has settings.json, the settings of a run of `train.finetune`, and data.npz, its batches in
its order. Writes outputs.npy, the classifier's outputs after each epoch, and result.json.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from galore_torch.adamw import AdamW
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

PROJECTED = ("query", "key", "value", "attention.output.dense", "intermediate.dense")


def main(folder: Path) -> None:
    """Trains, and evaluates after each epoch."""
    settings = json.loads((folder / "settings.json").read_text())
    data = dict(np.load(folder / "data.npz"))
    torch.manual_seed(settings["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["init"], num_labels=settings["classes"], attn_implementation="sdpa"
    )
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and _projected(name)]
    if settings["optimizer"].startswith("lora"):
        model = _with_lora(model, [name.removesuffix(".weight") for name in names], settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(model, names, settings)
    warmup, steps = settings["warmup_steps"], settings["steps"]
    # As in `train.finetune`; transformers' own warm-up begins with a step of rate 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / (warmup + 1), (steps - t) / (steps - warmup))
    )
    outputs, seconds, tokens = [], [], []
    for step in range(steps):
        model.train()
        batch = _batch(data, "train", step)
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if settings["clip_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings["clip_norm"])
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        tokens.append(int(batch["attention_mask"].sum()))
        if (step + 1) % settings["eval_every"] == 0 or step + 1 == steps:
            outputs.append(_evaluated(model, data))
    np.save(folder / "outputs.npy", np.stack(outputs))
    rate = sum(tokens[3:]) / sum(seconds[3:])
    (folder / "result.json").write_text(json.dumps({"tokens_per_second": rate}))


def _projected(name: str) -> bool:
    """Whether a matrix is one of attention or MLP."""
    return "encoder.layer" in name and (
        name.endswith(".output.dense.weight") or any(f".{x}." in name for x in PROJECTED)
    )


def _with_lora(model: Any, modules: list[str], settings: dict[str, Any]) -> Any:
    """Adapters beside `modules`; these, the pooler and the classifier are trained."""
    rank = settings["rank"]
    pooler = ["pooler"] if isinstance(model, BertForSequenceClassification) else []
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=settings["alpha"] or rank,
        lora_dropout=settings["dropout"] or 0.0,
        target_modules=modules,
        modules_to_save=["classifier", *pooler],
    )
    return get_peft_model(model, config)


def _optimizer(model: Any, names: list[str], settings: dict[str, Any]) -> torch.optim.Optimizer:
    betas = (settings["b1"], settings["b2"])
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    common = dict(lr=rate, betas=betas, eps=settings["eps"], weight_decay=decay)
    if not settings["optimizer"].startswith("galore"):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, **common)
    named = dict(model.named_parameters())
    low_rank = [named[name] for name in names]
    rest = [p for name, p in named.items() if name not in set(names)]
    galore = dict(
        rank=settings["rank"],
        update_proj_gap=settings["update_proj_gap"],
        scale=settings["scale"],
        proj_type="std",
    )
    groups = [{"params": rest}, {"params": low_rank, **galore}]
    return AdamW(groups, no_deprecation_warning=True, **common)


def _evaluated(model: Any, data: dict[str, np.ndarray]) -> np.ndarray:
    """The outputs of all examples to evaluate on, in their order."""
    model.eval()
    with torch.no_grad():
        parts = [
            model(**{k: v for k, v in _batch(data, "eval", i).items() if k != "labels"}).logits
            for i in range(len(data["eval_length"]))
        ]
    outputs = np.empty((len(data["labels"]), parts[0].shape[1]), np.float32)
    for numbers, part in zip(data["eval_numbers"], parts, strict=True):
        outputs[numbers[numbers >= 0]] = part[numbers >= 0].numpy()
    return outputs


def _batch(data: dict[str, np.ndarray], split: str, i: int) -> dict[str, torch.Tensor]:
    length = data[f"{split}_length"][i]
    names = {"input_ids": "inputs", "token_type_ids": "token_types", "attention_mask": "mask"}
    batch = {k: data[f"{split}_{v}"][i, :, :length].astype(np.int64) for k, v in names.items()}
    labels = data[f"{split}_targets"][i]
    batch["labels"] = labels if labels.dtype == np.float32 else labels.astype(np.int64)
    return {k: torch.from_numpy(v) for k, v in batch.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
