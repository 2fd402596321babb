r"""Runs of `benchmarks.glue` beside the same by transformers, galore-torch and peft.

    python -m benchmarks.glue_peers --records FILE --peer-python PYTHON \
        --data-dir DIR --init DIR --out DIR

PYTHON has torch, transformers, galore-torch and peft. Of the finished runs in FILE, those of full
fine-tuning, GaLore and LoRA that have several seeds are trained by the peer, too: the same weights,
batches in the same order, lengths, steps, schedule and settings. The peer has its own random
numbers for dropout and for the classifier's weights. Finished ones are reused, from --out or from
--peer-records; the table goes to standard output and to peers.md in --out.
"""

import dataclasses
import json
import statistics
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import read_records
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
# The only values with which the peer trains of settings that it does not read.
_SAME = {
    "schedule": ("linear",), "floor": (0.0,), "patience": (None,), "stagger": (None, False),
    "side": (None, "smaller"), "adapter": (None, "lora"), "adapter_pattern": (None,),
    "train": (None, "pooler|classifier"), "freeze": (None,), "weight_bits": (None,),
    "dtype": ("float32",), "weight_dtype": ("float32",), "state_dtype": ("float32",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peers:
    """Fine-tunes by other libraries what `benchmarks.glue` has fine-tuned."""

    records: Path
    """Finished runs of benchmarks.glue, its --records."""
    data_dir: Path
    """Folder of the tasks."""
    init: Path
    """Folder with the weights to begin with."""
    out: Path
    """Folder for the peer's runs."""
    peer_python: str
    """A Python with torch, transformers, galore-torch and peft."""
    peer_records: Path | None = None
    """A file with a JSON line of each finished run of the peer, to which new ones are added."""
    seeds: int = 2
    """Seeds of each setting; settings with fewer are left out, further ones not trained."""


def main(config: Peers) -> None:
    """Trains what is missing and prints the table; SystemExit for runs that the peer has not."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(config.records):
        name, _, _ = record["name"].rpartition("-")  # of the seed
        groups.setdefault(name, []).append(record)
    lines = [
        "| task | optimizer, learning rate | seeds | ours | peer | tokens/s: ours | peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    for runs in groups.values():
        settings = runs[0]["config"]
        if settings["optimizer"] not in PEERS or len(runs) < config.seeds:
            continue
        _check_same(runs[0])
        runs = sorted(runs, key=lambda x: x["config"]["seed"])
        peer = [_trained(config, run) for run in runs[: config.seeds]]
        own = [run["summary"] for run in runs]
        cells = [_spread([x["eval_metric"] for x in own]), _spread([x["metric"] for x in peer])]
        cells += [_speed(x) for x in (own, peer)]
        rank = "" if settings["rank"] is None else f" r={settings['rank']}"
        rate = f"{settings['learning_rate']:.1e}"
        named = f"{settings['optimizer']}{rank}, {rate}; {PEERS[settings['optimizer']]}"
        seeds = f"{len(own)}, {len(peer)}"
        lines.append(f"| {settings['task']} | {named} | {seeds} | {' | '.join(cells)} |")
        (config.out / "peers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _check_same(run: dict[str, Any]) -> None:
    """Raises SystemExit if a run has a setting with which the peer would train otherwise."""
    for name, values in _SAME.items():
        if (value := run["config"].get(name, values[0])) not in values:
            said = f"{name} {value!r}, and the peer trains with {values[0]!r}"
            raise SystemExit(f"--records: {run['name']} has {said}: take records without it")


def _trained(config: Peers, run: dict[str, Any]) -> dict[str, float]:
    """The peer's best metric and its speed; the best of the epochs, as for the run."""
    for record in read_records(config.peer_records):
        if record["name"] == run["name"] and record["flags"] == run["flags"]:
            return record["result"]
    places = {"data_dir": str(config.data_dir), "init": str(config.init)}
    folder, settings = config.out / run["name"], run["config"] | places
    if (folder / "result.json").exists():
        made = json.loads((folder / "settings.json").read_text())
        if any(made.get(key) != value for key, value in settings.items()):
            raise SystemExit(f"{folder} was trained with other settings: name another --out")
    task = TASKS[settings["task"]]
    settings = {**settings, "classes": task.classes}
    data = _arrays(settings)
    if not (folder / "result.json").exists():
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings))
        np.savez(folder / "data.npz", allow_pickle=False, **data)
        program = Path(__file__).with_name("peer_glue.py")
        subprocess.run([config.peer_python, program, folder], check=True)
    found = [
        scores(task.metrics, x.argmax(-1) if task.labels else x[:, 0], data["labels"])
        for x in np.load(folder / "outputs.npy")
    ]
    speed = json.loads((folder / "result.json").read_text())
    result = {"metric": max(x[task.metrics[0]] for x in found), **speed}
    if config.peer_records is not None:
        record = {"name": run["name"], "flags": run["flags"], "result": result}
        with config.peer_records.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return result


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


def _spread(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def _speed(runs: list[dict[str, Any]]) -> str:
    return f"{statistics.median(x['tokens_per_second'] for x in runs):,.0f}"


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Peers))
