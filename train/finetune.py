"""Fine-tune an encoder on a task of GLUE: `python -m train.finetune`; `--help` lists the flags.

A run's folder gets what one of train.pretrain gets, and predictions.tsv.
"""

from functools import partial

from train.config.glue import Finetune, check_given, glue_folder, resolve
from train.config.resolve import load, settings_file
from train.config.settings import expand_home
from train.data.glue import TRAIN, load_examples
from train.run.cli import run
from train.run.glue import assemble
from train.run.progress import say
from train.run.start import train


def main(config: Finetune) -> int:
    """Starts or resumes a fine-tuning.

    Returns and raises what `train.run.start.train` does.
    """
    config = expand_home(config)
    check_given(config)
    # The steps of an epoch depend on the number of examples.
    examples = load_examples(str(config.task), TRAIN, str(config.data_dir))
    assert examples is not None
    return train(resolve(config, len(examples)), partial(assemble, examples), say)


if __name__ == "__main__":
    run(
        main,
        Finetune,
        "python -m train.finetune",
        load=partial(load, kind=Finetune),
        settings_file=partial(settings_file, folder=glue_folder),
    )
