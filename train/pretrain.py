"""Pre-train a LLaMA: `python -m train.pretrain`; `--help` lists the flags.

A run's folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json, loss.png.
"""

from train.config.resolve import load, resolve, settings_file
from train.config.settings import Pretrain
from train.run.assemble import assemble
from train.run.cli import run
from train.run.progress import say
from train.run.start import train


def main(config: Pretrain) -> int:
    """Starts or resumes a pre-training.

    Returns and raises what `train.run.start.train` does.
    """
    return train(resolve(config), assemble, say)


if __name__ == "__main__":
    run(main, Pretrain, "python -m train.pretrain", load=load, settings_file=settings_file)
