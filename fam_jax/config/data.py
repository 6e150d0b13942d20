"""The data group: training data and held-out data."""

from fam_jax.config.errors import ConfigError, require
from fam_jax.config.fields import constraint_of, group, setting

PASSKEY, TEXT, SEQIO, MIXED = "passkey", "text", "seqio", "text+passkey"
PACKED = (TEXT, SEQIO)
# How examples are divided into rows.
LAYOUTS = ("packed", "by_row", "continuous")
# Vocabularies that are no files.
NAMED_VOCABULARIES = (PASSKEY, "bytes")


@group("data")
class DataConfig:
    """The training data. PassKey rows (section 3.2) are a key, filler and a question; other data has a layout."""

    task: str = setting(
        default="passkey",
        doc="passkey, text, text+passkey (batches of either), or seqio:NAME (a task or mixture; see imports).",
    )
    vocabulary: str = setting(
        default="passkey",
        doc="passkey (ships with the package), bytes, or the path of a SentencePiece model or tokenizer.json.",
        tasks=(PASSKEY, TEXT),
    )
    add_bos: bool = setting(
        default=False,
        doc="Begin each text with the vocabulary's start token, as most open models were trained.",
        tasks=(PASSKEY, TEXT, SEQIO),
    )
    # PassKey. Lengths are in blocks of the model.
    digits: int = setting(default=5, doc="Digits of a key.", minimum=1, maximum=9, tasks=(PASSKEY,))
    stage_blocks: tuple[int, ...] = setting(
        default=(2, 3, 4, 6, 9, 13, 18),
        doc="Longest filler of each stage of the curriculum, in blocks.",
        tasks=(PASSKEY,),
    )
    min_filler_blocks: int = setting(
        default=1,
        doc="Fillers of the first stage are longer than this; those of a later stage are longer than the stage before.",
        minimum=0,
        tasks=(PASSKEY,),
    )
    filler_step: int = setting(
        default=1,
        doc="Filler lengths are multiples of this many tokens; divides model.block_size.",
        minimum=1,
        tasks=(PASSKEY,),
    )
    advance_accuracy: float = setting(
        default=0.8,
        doc="Running exact match at which the next stage begins.",
        minimum=0,
        maximum=1,
        tasks=(PASSKEY,),
    )
    max_stage_steps: int = setting(
        default=0,
        doc="Begin the next stage after this many steps in any case; 0: never.",
        minimum=0,
        tasks=(PASSKEY,),
    )
    longest_fraction: float = setting(
        default=0.5,
        doc="Fraction of batches from the current stage; the others are from earlier stages.",
        minimum=0,
        maximum=1,
        tasks=(PASSKEY,),
    )
    prompt_weight: float = setting(
        default=0.01,
        doc="Loss weight of every token outside the answer; the answer has weight 1.",
        minimum=0,
        tasks=(PASSKEY,),
    )
    # Text and seqio. Examples are joined and cut into rows of one length.
    sequence_length: int = setting(
        default=1024, doc="T, tokens of a row; its last block may be short.", minimum=2, tasks=PACKED
    )
    layout: str = setting(
        default="packed",
        doc="packed: rows cut from one sequence of all examples, which every process reads. by_row: each row has "
        "examples of its own, joined, so a process reads those of its rows only. continuous: also, but a row holds one "
        "example, which goes on in the next batch.",
        choices=LAYOUTS,
        tasks=PACKED,
    )
    shuffle_batches: int = setting(
        default=8,
        doc="Layout packed: rows are shuffled within groups of this many batches.",
        minimum=1,
        tasks=PACKED,
    )
    repeat_segment: int = setting(
        default=0,
        doc="Length of the segment that a row repeats at its end, in tokens (section 3.1); 0: off.",
        minimum=0,
        tasks=PACKED,
    )
    repeat_weight: float = setting(default=0.1, doc="Loss weight of the repetition.", minimum=0, tasks=PACKED)
    # Text.
    train_files: tuple[str, ...] = setting(
        default=(),
        doc='Files, folders or patterns to train on (*.jsonl: a document per line, under "text"; also *.ndjson, '
        "*.json, *.parquet and *.gz), or tfds:NAME:SPLIT.",
        # Files may move; the state of the data checks their contents.
        effect="execution",
        tasks=(TEXT,),
    )
    heldout_files: tuple[str, ...] = setting(
        default=(), doc="Files to evaluate on, as in train_files.", effect="execution", tasks=(TEXT,)
    )
    file_suffixes: tuple[str, ...] = setting(
        default=(".txt",),
        doc="Endings of the files that count in a folder, in upper or lower case; hidden files do not count.",
        tasks=(TEXT,),
    )
    # seqio.
    imports: tuple[str, ...] = setting(
        default=(), doc="Modules to import, which register tasks.", tasks=(SEQIO,)
    )
    # Batches of text and PassKey, chosen at random.
    passkey_fraction: float = setting(
        default=0.5,
        doc="Fraction of batches that are PassKey; the others are text.",
        minimum=0,
        maximum=1,
        tasks=(MIXED,),
    )
    last_stage_passkey_fraction: float = setting(
        default=0.0,
        doc="The same once the curriculum has reached its last stage; 0: no change.",
        minimum=0,
        maximum=1,
        tasks=(MIXED,),
    )

    def check(self) -> None:
        """Raise :class:`ConfigError` if fields contradict each other or belong to another task."""
        stages = self.stage_blocks
        require(len(stages) > 0, "config.data.stage_blocks: must name at least one length")
        require(
            all(a < b for a, b in zip((self.min_filler_blocks, *stages), stages, strict=False)),
            f"config.data.stage_blocks: must increase and lie above min_filler_blocks {self.min_filler_blocks}, "
            f"got {stages}",
        )
        require(
            self.layout == "packed" or self.shuffle_batches == 8,
            f"config.data.shuffle_batches: belongs to the layout packed, but data.layout is {self.layout}; "
            "leave it at its default, 8",
        )
        require(
            self.layout != "continuous" or self.repeat_segment == 0,
            "config.data.repeat_segment: would interrupt the documents of the layout continuous; set it to 0",
        )

    def check_task(self) -> None:
        """Raise :class:`ConfigError` if the task is unknown, lacks something, or has fields of another task."""
        kind, _, name = self.task.partition(":")
        if self.task not in (PASSKEY, TEXT, MIXED) and not (kind == SEQIO and name):
            raise ConfigError(
                f"config.data.task: expected passkey, text, text+passkey or seqio:NAME, got {self.task!r}"
            )
        parts = {kind, *kind.split("+")}
        for name, field in self.__dataclass_fields__.items():
            tasks = constraint_of(field).tasks
            if tasks and not parts & {*tasks} and getattr(self, name) != field.default:
                raise ConfigError(
                    f"config.data.{name}: belongs to the task {' or '.join(tasks)}, but data.task is {self.task}; "
                    "leave it at its default"
                )
        require(
            TEXT not in parts or len(self.train_files) > 0,
            f"config.data.train_files: the task {self.task} needs files to train on",
        )
        require(
            TEXT not in parts or self.vocabulary != "passkey",
            "config.data.vocabulary: passkey has the words of its own task only; for text set bytes, or the path "
            "of a SentencePiece model",
        )
        require(
            self.layout != "continuous" or self.task != MIXED,
            "config.data.layout: batches of PassKey would interrupt the documents of continuous; "
            f"with the task {MIXED} use packed or by_row",
        )
