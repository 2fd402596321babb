"""The flags of the commands that train, in groups: each field is a flag, its docstring the help.

A class is a group, its docstring the title in the help; classes with one title are one group.
"""

import dataclasses
from typing import Literal

Optimizer = Literal[
    "adamw", "adamw8bit", "adafactor", "galore-adamw", "galore-adamw8bit", "galore-adafactor",
    "q-galore-adamw8bit", "fira-adamw", "apollo-adamw", "apollo-mini-adamw", "alice", "racs",
    "scale", "muon", "gradnorm-lorp-adamw", "lora-adamw", "relora-adamw", "qlora-adamw",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimizerFlags:
    """Optimizer."""

    optimizer: Optimizer = "galore-adamw"
    """Optimizer; the last four with the adapter of their name."""


@dataclasses.dataclass(frozen=True)
class AdapterFlags:
    """Adapters."""

    adapter: Literal["lora", "dora", "relora", "qlora", "low-rank", "gradnorm-lorp"] | None = None
    """Trained instead of the layers' matrices, which are frozen (low-rank: replaced). Other params
    are trained as --train says."""
    adapter_pattern: str | None = None
    """Regular expression for the paths of the matrices that get adapters, such as query|value.
    Default: all."""
    rank: int | None = None
    """Rank of GaLore, below the width of the model, or of the adapter. Default: the paper's for the
    model; 32 for tiny; a quarter of the width for another."""
    gradient_rank: int | None = None
    """Rank to which gradnorm-lorp-adamw projects the gradients of the adapter's factors, below
    --rank. Default: a quarter of --rank."""
    alpha: float | None = None
    """A LoRA or DoRA adapter is scaled by alpha / rank. Default: the rank."""
    dropout: float | None = None
    """Share of the inputs that a LoRA or DoRA adapter drops in training. Default: 0."""
    restart_every: int | None = None
    """Steps between two restarts of relora and gradnorm-lorp: adapters are merged and reset.
    Default: a fifth of --steps. As many as --steps: never."""
    restart_warmup: int | None = None
    """Warm-up steps of the learning rate after a restart. Default: a tenth of --restart-every."""


@dataclasses.dataclass(frozen=True)
class TrainedFlags:
    """What is trained."""

    train: str | None = None
    """Regular expression for the paths of the params that are trained besides adapters, such as
    layers|norm; paths are like layers/mlp/up, where all layers are one array. Default: all."""
    freeze: str | None = None
    """Regular expression for the paths of params that are not trained, such as embedding|head. They
    have no gradient and no optimizer state. Default: none."""


@dataclasses.dataclass(frozen=True)
class GaLoreFlags:
    """GaLore."""

    update_proj_gap: int | None = None
    """Steps between refreshes of a subspace. Default: 200; 500 for llama-7b, 100 for tiny."""
    scale: float | None = None
    """Factor of projected updates and of racs. Default: 0.25, or as published."""
    subspace: Literal["randomized", "power", "svd", "random", "switched", "sampled"] | None = None
    """How GaLore finds a subspace: a randomized range finder, a power step from the last basis, the
    exact SVD (published), at random, as Alice (switched) or SARA (sampled). Default: randomized."""
    moments: Literal["rotate", "keep", "reset"] | None = None
    """What GaLore does to moments at a refresh: carry them over, keep them (as published) or reset
    them. Default: rotate."""
    stagger: bool | None = None
    """Spread the refreshes of the matrices over the steps of --update-proj-gap, so that no step
    carries all. Default: no."""
    side: Literal["smaller", "larger", "left", "right", "both"] | None = None
    """Side of a matrix that GaLore projects; `larger` takes the least memory. Default: smaller, as
    published."""
    compensation: float | None = None
    """Factor of what alice adds from outside the subspace; 0: nothing. Default: 0.4; for a 1B model
    the paper has 0.2."""
    tracking: float | None = None
    """Decay rate of the mean of past gradients' products from which alice finds a subspace. 0: none
    is kept, and the last gradient alone counts (Alice-0). Default: 0.999."""
    leading: int | None = None
    """Leading directions in alice's subspace; the rest of --rank is drawn at random. Default: 5/16
    of --rank, as published."""


@dataclasses.dataclass(frozen=True)
class LowBitFlags:
    """Low-bit numbers."""

    moment_bits: int | None = None
    """Bits of a number of the moments, 8 or 4, with the 8-bit optimizers, fira, apollo, alice and
    gradnorm-lorp-adamw. Default: 8 with the 8-bit ones, else those of --dtype."""
    projection_bits: int | None = None
    """Bits of a number of GaLore's bases, 8 or 4. Default: those of --dtype; 4 with
    q-galore-adamw8bit."""
    adaptive_refresh: bool | None = None
    """Refresh a subspace less often once it has stopped changing. Default: only with
    q-galore-adamw8bit."""
    weight_bits: int | None = None
    """Bits of a weight of the layers' matrices, 8 or 4 (NF4 with an adapter), with
    q-galore-adamw8bit or an adapter. Default: 8 with q-galore-adamw8bit, 4 with qlora, else those
    of --dtype."""
    embedding_bits: int | None = None
    """Bits of a weight of embedding and head, 8 or 4, with q-galore-adamw8bit. Default: those of
    --dtype."""
    stochastic_rounding: bool | None = None
    """Round new weights that have fewer bits than float32 up or down at random, so that no update
    is lost on average. Default: with bfloat16 weights and with q-galore-adamw8bit. False, as
    published: to the nearest, which loses changes below a 512th of a bfloat16 weight."""


@dataclasses.dataclass(frozen=True)
class ScheduleFlags:
    """Learning rate, steps and batch."""

    learning_rate: float | None = None
    """Peak learning rate. Default: the paper's for GaLore (tiny: 0.02), 0.001 or 0.0005 for the
    others."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: a cosine or a line down to --floor, constant, or constant
    with a line down to --floor in the last --decay-steps (wsd)."""
    floor: float | None = None
    """Share of --learning-rate with which --schedule ends. Default: 0.1."""
    decay_steps: int | None = None
    """Last steps, in which --schedule wsd lowers the learning rate. Default: a fifth of --steps."""
    b1: float | None = None
    """Decay rate of AdamW's first moment. Default: 0.9."""
    b2: float | None = None
    """Decay rate of AdamW's second moment. Default: 0.999."""
    eps: float | None = None
    """Added to the root of AdamW's second moment. Default: 1e-8."""
    weight_decay: float | None = None
    """Decoupled weight decay, multiplied by the learning rate. Default: 0."""
    clip_norm: float | None = 1.0
    """Gradients are clipped to this global norm; none: not clipped."""
    steps: int | None = None
    """Updates of the weights. Default: the paper's for the model; 300 for tiny."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, before --schedule. Default: a tenth of --steps."""
    batch_size: int | None = None
    """Sequences per step, over all devices and microbatches. Default: the paper's 512; tiny: 16."""
    accumulate: int | None = None
    """Microbatches into which a step's batch is cut to save memory. Default: the fewest of at most
    16 sequences for llama-7b and llama-1b, 32, 64 or 128 for the smaller ones."""
    seq_len: int | None = None
    """Tokens per sequence. Default: the paper's 256; 128 for tiny."""


@dataclasses.dataclass(frozen=True)
class MemoryFlags:
    """Memory and devices."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the computation, and by default of weights, gradients and GaLore's bases. Default:
    float32; bfloat16 for llama-7b."""
    weight_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights, gradients and GaLore's bases. Default: --dtype."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of moments that are not quantized. In bfloat16, as published with bfloat16 weights,
    second moments hardly ever fall. Default: float32; bfloat16 for llama-7b with adamw."""
    rematerialize: bool | None = None
    """Recompute activations in the backward pass instead of storing them. Default: only for
    llama-7b."""
    mesh: str | None = None
    """Devices, such as data=2,fsdp=4 (axes: data, fsdp, tensor). Default: one device; with several
    processes data=N over all of theirs."""
    deterministic: bool = False
    """Use only operations that give the same bits each time, on GPUs too."""


@dataclasses.dataclass(frozen=True)
class HostFlags:
    """Memory and devices."""

    processes: int | None = None
    """Processes of the run, on one or several hosts, each started with the same flags, and with the
    same files at the same paths. Default: 1."""
    process: int | None = None
    """Number of this process, from 0. The first prints, and writes what is not a checkpoint."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 listens and the others find it."""
    launcher: bool = False
    """Take --processes, --process and --coordinator from the environment, as SLURM, Open MPI,
    Kubernetes (indexed jobs, with the package kubernetes) or torchrun set it."""


@dataclasses.dataclass(frozen=True)
class LayerwiseFlags:
    """Memory and devices."""

    scan_layers: bool | None = None
    """Run the layers in a loop, which compiles in a time that does not grow with depth, instead of
    one by one, which is faster on a GPU and takes more memory. Default: False on GPUs that share no
    weights (fsdp, tensor), without --layerwise and --rematerialize."""
    accumulate_in_subspace: bool = False
    """Sum the microbatches' gradients projected, a fraction of their size, and clip them by their
    norm there; the first microbatch gives a new subspace. With --layerwise: for the layers only."""
    compress_gradients: bool = False
    """With --mesh data=N, all-reduce gradients projected, a fraction of their size, and clip them
    by their norm there. Microbatches are summed as with --accumulate-in-subspace."""
    compress_bits: int | None = None
    """8: --compress-gradients sends 8 bits a number; what rounding leaves out is sent in the next
    step, until when each device keeps it, in float32."""
    layerwise: bool = False
    """Update each layer within the backward pass: only one layer's gradient is in memory."""
    clip: Literal["exact", "previous"] | None = None
    """Norm by which --layerwise clips: the step's own (a second backward pass), or the previous
    step's. Default: exact; previous if projected."""


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The run."""

    eval_every: int | None = None
    """Steps between two evaluations. Default: a tenth of --steps."""
    save_every: int | None = None
    """Steps between two checkpoints; none is saved while steps are skipped. Default: --eval-every.
    The best is chosen among checkpoints whose step is evaluated."""
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    log_every: int | None = None
    """Steps between two lines on the screen; metrics.jsonl has every step. Default: a fiftieth of
    --steps."""
    patience: int | None = None
    """The run ends after this many evaluations in a row that were no better than the best before.
    Default: it never ends early."""
    energy_every: int | None = None
    """Steps between two measurements for subspace.png, each as long as a backward pass. Default:
    none. It shows what GaLore's bases keep of the gradient's energy, and how far they turn."""
    profile: int | None = None
    """Steps to trace into profile/, for TensorBoard and Perfetto. Default: none."""
    track: Literal["wandb", "mlflow"] | None = None
    """Service that gets the metrics, too. Its package must be installed. Default: none."""
    max_skipped: int = 10
    """The run stops after this many steps in a row whose loss or gradient is not finite."""
    seed: int = 0
    """Seed of the weights, the order of the data and GaLore's random choices."""
    out: str | None = None
    """Folder of the run. Default: runs/MODEL-OPTIMIZER, or runs/MODEL-ADAPTER-OPTIMIZER with an
    --adapter; with --resume that of --config."""
    resume: bool = False
    """Resume from the newest checkpoint in --out, or start if there is none."""
    config: str | None = None
    """A config.json to read the settings from; other flags override it. Another --init brings its
    own model and tokenizer."""


@dataclasses.dataclass(frozen=True)
class TrainingFlags(
    RunFlags,
    MemoryFlags,
    ScheduleFlags,
    LowBitFlags,
    GaLoreFlags,
    TrainedFlags,
    AdapterFlags,
    OptimizerFlags,
):
    """What every command that trains takes, whatever its model and data."""

    command = ""  # the module that `python -m` runs
    less_memory = ""  # what to try if the memory is too small
    # For commands without `HostFlags` or `LayerwiseFlags`.
    processes = process = coordinator = None
    launcher = False
    layerwise = False
    accumulate_in_subspace = False
    compress_gradients = False
    compress_bits = None
    clip = None
