"""The groups of a training run: optimizer, loop, low-rank adaptation, evaluation, mesh."""

from fam_jax.config.errors import require
from fam_jax.config.fields import group, setting

# JAX uses the lower 32 bits of a seed.
LARGEST_SEED = 2**32 - 1
ABLATIONS = ("zeroed", "shuffled", "frozen")


@group("optimizer")
class OptimizerConfig:
    """Adafactor with the paper's betas (section 3.1), or AdamW."""

    name: str = setting(default="adafactor", doc="Optimizer.", choices=("adafactor", "adamw"))
    learning_rate: float = setting(default=1e-4, doc="Learning rate after the warm-up.", minimum=0)
    schedule: str = setting(
        default="constant",
        doc="Learning rate after the warm-up; cosine falls to zero at train.steps.",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = setting(default=0, doc="Steps of linear warm-up.", minimum=0)
    beta1: float = setting(default=0.9, doc="Decay of the momentum.", minimum=0, below=1)
    beta2: float = setting(default=0.99, doc="Decay of the second moments.", minimum=0, below=1)
    beta2_schedule: str = setting(
        default="constant",
        doc="constant (debiased), or power: 1 - t^-beta2_power.",
        choices=("constant", "power"),
    )
    beta2_power: float = setting(default=0.8, doc="Exponent of the power schedule.", minimum=0, below=1)
    parameter_scaling: bool = setting(
        default=False, doc="Adafactor: multiply updates by the RMS of their parameter."
    )
    block_rms_clip: float = setting(
        default=1.0, doc="Adafactor: clip the RMS of a parameter's update to this; 0: off.", minimum=0
    )
    min_factored_dim: int = setting(
        default=128, doc="Adafactor: factor second moments where both dimensions reach this.", minimum=1
    )
    epsilon: float = setting(
        default=1e-30,
        doc="Adafactor: added to squared gradients. AdamW: added to the denominator; 1e-8 is usual.",
        minimum=0,
    )
    weight_decay: float = setting(default=0.0, doc="Decoupled weight decay, of matrices only.", minimum=0)
    clip_norm: float = setting(default=1.0, doc="Clip the global gradient norm to this; 0: off.", minimum=0)


@group("train")
class TrainConfig:
    """The training loop."""

    steps: int = setting(default=1000, doc="Optimizer steps of the run.", minimum=1, effect="execution")
    batch_size: int = setting(default=16, doc="B, rows of a step.", minimum=1)
    accumulation: int = setting(
        default=1, doc="Micro-batches of a step; divides batch_size.", minimum=1, effect="execution"
    )
    seed: int = setting(
        default=0, doc="Seed of parameters, data order and steps.", minimum=0, maximum=LARGEST_SEED
    )
    loss_chunk: int = setting(
        default=4096, doc="Tokens whose logits exist at one time.", minimum=1, effect="execution"
    )
    z_loss: float = setting(default=0.0, doc="Weight of log(Z)^2 in the loss.", minimum=0)
    random_state_passing: float = setting(
        default=0.0,
        doc="Probability that a row starts from the state that the last step left (0.8 in the paper).",
        minimum=0,
        maximum=1,
    )
    random_state_passing_from: int = setting(
        default=0, doc="First step with random state passing.", minimum=0
    )
    carry: str = setting(
        default="none",
        doc="What rows of the data layout continuous go on with in the next step: none (each begins a new stream), "
        "memory, or all (the window, too).",
        choices=("none", "memory", "all"),
    )
    random_position_offset: bool = setting(
        default=False, doc="Add a random offset to positions (appendix B.2.2)."
    )
    log_every: int = setting(
        default=10, doc="Steps between two lines of metrics.", minimum=1, effect="execution"
    )
    checkpoint_every: int = setting(
        default=500, doc="Steps between two checkpoints.", minimum=1, effect="execution"
    )
    keep_checkpoints: int = setting(
        default=2, doc="Newest checkpoints to keep.", minimum=1, effect="execution"
    )
    init_from: str = setting(
        default="", doc="Workdir (or WORKDIR/STEP) of a run whose parameters this one starts from."
    )
    bptt_blocks: int = setting(
        default=0,
        doc="k, blocks through which gradients pass within a row (truncated backpropagation through time); 0: all.",
        minimum=0,
    )
    bptt_kind: str = setting(
        default="chunked",
        doc="Where gradients stop. chunked: at every k-th block border. last: at the border before the last k blocks.",
        choices=("chunked", "last"),
    )
    skip_batches: int = setting(
        default=3,
        doc="Batches in a row that are skipped if their loss, gradient or update is not finite: they change nothing "
        "but the step. One more stops the run.",
        minimum=0,
        effect="execution",
    )

    def check(self) -> None:
        """Raise :class:`ConfigError` if fields contradict each other."""
        require(
            self.batch_size % self.accumulation == 0,
            f"config.train.accumulation: {self.accumulation} does not divide batch_size {self.batch_size}",
        )
        require(
            self.carry == "none" or self.random_state_passing == 0,
            f"config.train.carry: {self.carry} and random_state_passing {self.random_state_passing:g} both choose "
            "what rows start from; set one of them to its default",
        )


@group("lora")
class LoraConfig:
    """Low-rank adaptation of a frozen base, which train.init_from names. The other fields apply if rank > 0.

    Patterns are those of `fnmatch`; they match parameter paths such as layers/query/kernel.
    """

    rank: int = setting(
        default=0, doc="Rank of each kernel's update (64 in the paper); 0: train all parameters.", minimum=0
    )
    alpha: float = setting(default=64.0, doc="Updates are scaled by alpha / rank.", above=0)
    targets: tuple[str, ...] = setting(
        default=("layers/*/kernel",), doc="Kernels that get an update; default: attention and feed-forward."
    )
    train: tuple[str, ...] = setting(
        default=("*memory/*",), doc="Parameters trained beside the updates; default: those of the memory."
    )
    base_dtype: str = setting(
        default="model",
        doc="Dtype of frozen matrices; model means model.dtype.",
        choices=("model", "float32", "bfloat16"),
    )
    random_base: bool = setting(
        default=False, doc="Adapt random weights if train.init_from is empty, to try things out."
    )

    def check(self) -> None:
        """Raise :class:`ConfigError` if there is a rank but nothing to adapt."""
        require(
            self.rank == 0 or len(self.targets) > 0,
            "config.lora.targets: must name at least one kernel, or set rank to 0",
        )


@group("evaluate", effect="execution")
class EvaluateConfig:
    """Evaluation from a streamed state: answers by generation (PassKey, algorithmic), or the loss on documents."""

    every: int = setting(
        default=0, doc="Training steps between evaluations; 0: none during training.", minimum=0
    )
    # PassKey and algorithmic tasks.
    filler_blocks: tuple[int, ...] = setting(
        default=(4, 9, 18, 36),
        doc="PassKey and algorithmic tasks: lengths in blocks, as in data.stage_blocks.",
        minimum=1,
        tasks=("passkey", "algorithmic"),
    )
    before_blocks: tuple[int, ...] = setting(
        default=(0,),
        doc="PassKey: lengths of the filler in front of the key, in blocks.",
        minimum=0,
        tasks=("passkey",),
    )
    keys: int = setting(
        default=64,
        doc="PassKey and algorithmic tasks: examples per length.",
        minimum=1,
        tasks=("passkey", "algorithmic"),
    )
    # Text and seqio.
    documents: int = setting(
        default=0,
        doc="Text: number of held-out documents, drawn by seed; 0: all.",
        minimum=0,
        tasks=("text",),
    )
    min_tokens: int = setting(default=0, doc="Text: leave out shorter documents.", minimum=0, tasks=("text",))
    ablations: tuple[str, ...] = setting(
        default=(),
        doc="Text: measure the loss again with the memory zeroed, shuffled or frozen.",
        choices=ABLATIONS,
        tasks=("text",),
    )
    # All.
    batch_size: int = setting(default=64, doc="Examples read together.", minimum=1)
    seed: int = setting(default=1_000_003, doc="Seed of the examples.", minimum=0, maximum=LARGEST_SEED)
    chunk_blocks: int = setting(default=16, doc="Blocks that prefill reads at a time.", minimum=1)

    def check(self) -> None:
        """Raise :class:`ConfigError` if there is no length to evaluate."""
        require(
            len(self.filler_blocks) > 0,
            f"config.evaluate.filler_blocks: must be positive lengths, got {self.filler_blocks}",
        )
        require(len(self.before_blocks) > 0, "config.evaluate.before_blocks: must name a length; 0 is none")


@group("mesh", effect="execution")
class MeshConfig:
    """Devices along each mesh axis. One of data and fsdp may be 0; it then takes the devices that remain."""

    data: int = setting(default=0, doc="Devices along the data axis: copies of the weights.", minimum=0)
    # An fsdp axis over a whole TPU slice makes the compiler use all-reduce in place of reduce-scatter.
    fsdp: int = setting(
        default=1, doc="Devices over which weights and optimizer state are divided.", minimum=0
    )
    tensor: int = setting(
        default=1, doc="Devices over which heads, feed-forward and vocabulary are divided.", minimum=1
    )

    def check(self) -> None:
        """Raise :class:`ConfigError` if two axes are automatic."""
        require(
            self.data > 0 or self.fsdp > 0,
            "config.mesh: data and fsdp are both 0 (automatic); set at least one",
        )
