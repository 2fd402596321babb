"""Runs of `benchmarks.glue` beside the same by transformers, galore-torch and peft.

    python -m benchmarks.glue_peers --runs DIR --peer-python PYTHON

PYTHON has torch, transformers, galore-torch and peft. Of the finished runs in DIR, those of full
fine-tuning, GaLore and LoRA that have several seeds are trained by the peer, too: the same weights,
batches in the same order, lengths, steps, schedule and settings, from the run's config.json. The
peer has its own random numbers for dropout and for the classifier's weights. Finished ones are
reused; the table goes to standard output and to peers.md in DIR.
"""

import dataclasses
import json
import statistics
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from models.hugging_face.roberta import read_config
from train.config.glue import TOKENIZER
from train.data.glue import TASKS, TRAIN, VALIDATION, load_examples
from train.data.pairs import Batch, PairData, PairTokenizer, pair_data
from train.run.glue import types_read
from train.run.scores import scores

PEERS = {
    "adamw": "transformers",
    "galore-adamw": "transformers, galore-torch",
    "lora-adamw": "transformers, peft",
}


@dataclasses.dataclass(frozen=True)
class Peers:
    """Fine-tunes by other libraries what `benchmarks.glue` has fine-tuned."""

    runs: Path
    """Folder of the runs, --out of benchmarks.glue."""
    peer_python: str
    """A Python with torch, transformers, galore-torch and peft."""
    seeds: int = 2
    """Settings with fewer seeds are left out."""


def main(config: Peers) -> None:
    """Trains what is missing and prints the table."""
    groups: dict[str, list[Path]] = {}
    for summary in sorted(config.runs.glob("*/summary.json")):
        name, _, _ = summary.parent.name.rpartition("-")  # of the seed
        groups.setdefault(name, []).append(summary.parent)
    lines = [
        "| task | optimizer, learning rate | seeds | ours | peer | tokens/s: ours | peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for runs in groups.values():
        settings = _read(runs[0] / "config.json")
        if settings["optimizer"] not in PEERS or len(runs) < config.seeds:
            continue
        own = [_read(run / "summary.json") for run in runs]
        peer = [_trained(run, config.peer_python) for run in runs]
        cells = [_spread([x["eval_metric"] for x in own]), _spread([x["metric"] for x in peer])]
        cells += [_speed(x) for x in (own, peer)]
        rank = "" if settings["rank"] is None else f" r={settings['rank']}"
        rate = f"{settings['learning_rate']:.1e}"
        named = f"{settings['optimizer']}{rank}, {rate}; {PEERS[settings['optimizer']]}"
        lines.append(f"| {settings['task']} | {named} | {len(runs)} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (config.runs / "peers.md").write_text(text)
    print(text, end="")


def _trained(run: Path, python: str) -> dict[str, float]:
    """The peer's best metric and its speed; the best of the epochs, as for the run."""
    folder = run / "peer"
    settings = _read(run / "config.json")
    task = TASKS[settings["task"]]
    if not (folder / "result.json").exists():
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text(json.dumps({**settings, "classes": task.classes}))
        np.savez(folder / "data.npz", allow_pickle=False, **_arrays(settings))
        subprocess.run([python, Path(__file__).with_name("peer_glue.py"), folder], check=True)
    with np.load(folder / "data.npz") as data:
        labels = data["labels"]
    found = [
        scores(task.metrics, x.argmax(-1) if task.labels else x[:, 0], labels)[task.metrics[0]]
        for x in np.load(folder / "outputs.npy")
    ]
    return {"metric": max(found), **_read(folder / "result.json")}


def _arrays(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The batches of a run, padded to --seq-len, with the length of each."""
    model = read_config(Path(settings["init"]))
    path = Path(settings["init"]) / TOKENIZER
    tokenizer = PairTokenizer(
        path, settings["seq_len"], model.vocab_size, types_read(model), model.pad_id
    )
    data: dict[str, PairData] = {}
    for split in (TRAIN, VALIDATION):
        examples = load_examples(settings["task"], split, settings["data_dir"])
        assert examples is not None
        how = {"batch_size": settings["batch_size"], "seed": settings["seed"]}
        data[split] = pair_data(examples, tokenizer, pad_id=model.pad_id or 0, **how)
    train = [batch for batch, _ in islice(data[TRAIN].batches(), settings["steps"])]
    evaluation, numbers = zip(*data[VALIDATION].evaluation(settings["batch_size"]), strict=True)
    padded = [x + [-1] * (settings["batch_size"] - len(x)) for x in numbers]
    return {
        **_stacked("train", train, settings),
        **_stacked("eval", list(evaluation), settings),
        "eval_numbers": np.array(padded),
        "labels": data[VALIDATION].labels,
    }


def _stacked(split: str, batches: list[Batch], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    rows, length = settings["batch_size"], settings["seq_len"]
    arrays: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name in ("inputs", "token_types", "mask"):
            array = batch[name]
            more = ((0, rows - len(array)), (0, length - array.shape[1]))
            arrays.setdefault(name, []).append(np.pad(array, more))
        targets = np.pad(batch["targets"], (0, rows - len(batch["targets"])))
        arrays.setdefault("targets", []).append(targets)
    lengths = np.array([batch["inputs"].shape[1] for batch in batches])
    named = {f"{split}_{name}": np.stack(x) for name, x in arrays.items()}
    return {**named, f"{split}_length": lengths}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def _speed(runs: list[dict[str, Any]]) -> str:
    return f"{statistics.median(x['tokens_per_second'] for x in runs):,.0f}"


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Peers))
