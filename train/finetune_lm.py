"""Fine-tune a LLaMA on your own text: `python -m train.finetune_lm`; `--help` lists the flags.

A run's folder gets what train.pretrain's does, and train.generate and train.export read it.
"""

from functools import partial

from train.config.finetune_lm import finetuning_folder, load_finetuning, resolve_finetuning
from train.config.resolve import settings_file
from train.config.settings import FinetuneLM
from train.run.cli import run
from train.run.finetune_lm import assemble, count_steps
from train.run.progress import say
from train.run.start import train


def main(config: FinetuneLM) -> int:
    """Starts or resumes a fine-tuning; returns and raises what `train` does."""
    return train(resolve_finetuning(config, count_steps), assemble, say)


if __name__ == "__main__":
    run(
        main,
        FinetuneLM,
        "python -m train.finetune_lm",
        load=load_finetuning,
        settings_file=partial(settings_file, folder=finetuning_folder),
    )
