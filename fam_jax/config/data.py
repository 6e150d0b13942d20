"""The data group: training data and held-out data."""

import math

from fam_jax.config.errors import ConfigError, require
from fam_jax.config.fields import constraint_of, group, setting

PASSKEY, TEXT, SEQIO, MIXED = "passkey", "text", "seqio", "text+passkey"
INSTRUCTIONS, ALGORITHMIC = "instructions", "algorithmic"
# Names of algorithmic tasks.
ALGORITHMS = ("remember", "rewrite", "copy", "reverse")
PACKED = (TEXT, SEQIO, INSTRUCTIONS)
# Tasks with a curriculum of lengths.
STAGED = (PASSKEY, ALGORITHMIC)
# Tasks whose examples come from files.
OF_FILES = (TEXT, INSTRUCTIONS)
# Shapes of rows of instructions; auto: by their keys.
FORMATS = (
    "auto", "natural_instructions", "messages", "sharegpt", "p3", "flan", "prompt_completion", "dolly", "alpaca",
    "text",
)  # fmt: skip
# How examples are divided into rows.
LAYOUTS = ("packed", "by_row", "continuous")
# Vocabularies that are no files.
NAMED_VOCABULARIES = (PASSKEY, "bytes")


@group("data")
class DataConfig:
    """The training data. PassKey (section 3.2) and algorithmic tasks have a curriculum; other data has a layout."""

    task: str = setting(
        default="passkey",
        doc="passkey, text, instructions, text+passkey (batches of either), algorithmic:NAME (remember, rewrite, copy "
        "or reverse), or seqio:NAME (a task or mixture; see imports).",
    )
    vocabulary: str = setting(
        default="passkey",
        doc="passkey (ships with the package), bytes, or the path of a SentencePiece model or tokenizer.json.",
        tasks=(PASSKEY, *OF_FILES, ALGORITHMIC),
    )
    add_bos: bool = setting(
        default=False,
        doc="Begin each text with the vocabulary's start token, as most open models were trained.",
        tasks=(PASSKEY, *PACKED),
    )
    # PassKey and algorithmic tasks. Lengths are in blocks of the model.
    digits: int = setting(default=5, doc="Digits of a key.", minimum=1, maximum=9, tasks=(PASSKEY,))
    stage_blocks: tuple[int, ...] = setting(
        default=(2, 3, 4, 6, 9, 13, 18),
        doc="Longest filler of each stage of the curriculum, in blocks; of algorithmic tasks, blocks of pairs or of "
        "the list.",
        tasks=STAGED,
    )
    min_filler_blocks: int = setting(
        default=1,
        doc="Fillers of the first stage are longer than this; those of a later stage are longer than the stage before.",
        minimum=0,
        tasks=STAGED,
    )
    filler_step: int = setting(
        default=1,
        doc="Filler lengths are multiples of this many tokens; divides model.block_size.",
        minimum=1,
        tasks=(PASSKEY,),
    )
    advance_accuracy: float = setting(
        default=0.8,
        doc="Running exact match at which the next stage begins; 0: only max_stage_steps decides, so all models see "
        "the same batches.",
        minimum=0,
        maximum=1,
        tasks=STAGED,
    )
    max_stage_steps: int = setting(
        default=0,
        doc="Begin the next stage after this many steps in any case; 0: never.",
        minimum=0,
        tasks=STAGED,
    )
    longest_fraction: float = setting(
        default=0.5,
        doc="Fraction of batches from the current stage; the others are from earlier stages.",
        minimum=0,
        maximum=1,
        tasks=STAGED,
    )
    late_keys: float = setting(
        default=0.0,
        doc="Fraction of rows whose key stands within its filler, at the border of a block chosen at random. In the "
        "others it comes first.",
        minimum=0,
        maximum=1,
        tasks=(PASSKEY,),
    )
    questions: int = setting(
        default=1,
        doc="How often a row is asked for the same key, after more filler each time, in as many batches one after the "
        "other, from max_stage_steps into the last stage on. Above 1, it needs train.carry=memory.",
        minimum=1,
        tasks=(PASSKEY,),
    )
    prompt_weight: float = setting(
        default=0.01,
        doc="Loss weight of every token outside the answer; the answer has weight 1.",
        minimum=0,
        tasks=STAGED,
    )
    # Text and seqio. Examples are joined and cut into rows of one length.
    sequence_length: int = setting(
        default=1024, doc="T, tokens of a row; its last block may be short.", minimum=2, tasks=PACKED
    )
    layout: str = setting(
        default="packed",
        doc="packed: rows cut from one sequence of all examples, which every process reads. by_row: each row has "
        "examples of its own, joined, so a process reads those of its rows only (for seqio tasks, see seqio_shards). "
        "continuous: also, but a row holds one example, which goes on in the next batch.",
        choices=LAYOUTS,
        tasks=PACKED,
    )
    shuffle_batches: int = setting(
        default=8,
        doc="Layout packed, and by_row of seqio tasks: rows are shuffled within groups of this many batches.",
        minimum=1,
        tasks=PACKED,
    )
    repeat_segment: int = setting(
        default=0,
        doc="Length of the segment that a row repeats at its end, in tokens (section 3.1); 0: off.",
        minimum=0,
        tasks=PACKED,
    )
    repeat_before_blocks: int = setting(
        default=0,
        doc="Blocks between the segment and the block in which its repetition begins, so that a window of as many "
        "blocks does not see it; 0: it may lie anywhere.",
        minimum=0,
        tasks=PACKED,
    )
    repeat_weight: float = setting(default=0.1, doc="Loss weight of the repetition.", minimum=0, tasks=PACKED)
    # Text and instructions.
    train_files: tuple[str, ...] = setting(
        default=(),
        doc='Files, folders or patterns to train on (*.jsonl: a document per line, under "text"; also *.ndjson, '
        "*.json, *.parquet and *.gz), or tfds:NAME:SPLIT. For instructions, files of these formats with other rows.",
        # Files may move; the state of the data checks their contents.
        effect="execution",
        tasks=OF_FILES,
    )
    heldout_files: tuple[str, ...] = setting(
        default=(), doc="Files to evaluate on, as in train_files.", effect="execution", tasks=OF_FILES
    )
    file_suffixes: tuple[str, ...] = setting(
        default=(".txt",),
        doc="Endings of the files that count in a folder, in upper or lower case; hidden files do not count. At the "
        "default, those of instructions are .jsonl, .ndjson, .json and .parquet, also with .gz.",
        tasks=OF_FILES,
    )
    # Instructions. Weight 0 on what a model is given, 1 on what it is to write.
    mixture: tuple[tuple[str, float], ...] = setting(
        default=(),
        doc="Several sources in place of train_files, each with the rate of its examples: "
        "flan/*.parquet=0.4,t0=0.3,seqio:cot=0.3",
        # As train_files; the state of the data checks the rates, too.
        effect="execution",
        tasks=(INSTRUCTIONS,),
    )
    format: str = setting(
        default="auto", doc="Shape of the rows; auto: by their keys.", choices=FORMATS, tasks=(INSTRUCTIONS,)
    )
    skip_bad: bool = setting(
        default=False,
        doc="Leave out rows that cannot be used, and say how many, instead of stopping at the first.",
        tasks=(INSTRUCTIONS,),
    )
    chat_template: str = setting(
        default="",
        doc="File of a chat template to use instead of the tokenizer's own.",
        # The state of the data checks the texts.
        effect="execution",
        tasks=(INSTRUCTIONS,),
    )
    as_chat: bool = setting(
        default=False,
        doc="Put prompt and answer of all rows into the chat template, as turns of user and assistant.",
        tasks=(INSTRUCTIONS,),
    )
    separator: str = setting(
        default="",
        doc="Text between inputs and targets, if they are no chat.",
        tasks=(INSTRUCTIONS,),
    )
    positive_examples: int = setting(
        default=2,
        doc="Examples in a prompt of Natural Instructions, as far as the task has them.",
        minimum=0,
        tasks=(INSTRUCTIONS,),
    )
    # seqio.
    imports: tuple[str, ...] = setting(
        default=(), doc="Modules to import, which register tasks of seqio.", tasks=(SEQIO, INSTRUCTIONS)
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

    # Algorithmic tasks.
    key_letters: int = setting(
        default=1, doc="Letters of a key, one of 16 each.", minimum=1, maximum=8, tasks=(ALGORITHMIC,)
    )
    value_letters: int = setting(
        default=1, doc="Letters of a value, one of 16 each.", minimum=1, maximum=8, tasks=(ALGORITHMIC,)
    )
    # seqio.
    seqio_shards: int = setting(
        default=16,
        doc="Layout by_row of a seqio task: shards of its examples, each for a group of neighboring rows; a process "
        "reads those of its rows. Use as many as there are processes, or more, but no more than the task has files. "
        "The number is the greatest common divisor of this and the batch size.",
        minimum=1,
        tasks=PACKED,
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
            self.advance_accuracy > 0 or self.max_stage_steps > 0,
            "config.data.max_stage_steps: must say how long a stage lasts if data.advance_accuracy is 0; set one of "
            "the two",
        )
        for path, rate in self.mixture:
            require(
                bool(path.strip()) and 0 < rate < math.inf,
                f"config.data.mixture: expected files and a rate above 0, got {path!r} with {rate}; write FILES=RATE",
            )
        require(
            self.layout == "packed"
            or self.shuffle_batches == 8
            or (self.layout == "by_row" and self.task.startswith(f"{SEQIO}:")),
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
        known = self.task in (PASSKEY, TEXT, INSTRUCTIONS, MIXED) or (kind == SEQIO and name)
        if not known and not (kind == ALGORITHMIC and name in ALGORITHMS):
            raise ConfigError(
                "config.data.task: expected passkey, text, instructions, text+passkey, seqio:NAME or "
                f"algorithmic:NAME with NAME {', '.join(ALGORITHMS)}, got {self.task!r}"
            )
        require(
            kind != ALGORITHMIC or self.vocabulary == "bytes",
            f"config.data.vocabulary: {self.task} is spelled letter by letter; set it to bytes",
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
            INSTRUCTIONS not in parts or bool(self.train_files) != bool(self.mixture),
            "config.data.train_files: the task instructions needs files to train on; set it or data.mixture, not both",
        )
        require(
            not parts & {*OF_FILES} or self.vocabulary != "passkey",
            "config.data.vocabulary: passkey has the words of its own task only; for text set bytes, or the path "
            "of a SentencePiece model",
        )
        require(
            self.questions == 1 or self.task != MIXED,
            "config.data.questions: batches of text would interrupt the rows of PassKey; set it to 1, or data.task to "
            "passkey",
        )
        require(
            self.layout != "continuous" or self.task != MIXED,
            "config.data.layout: batches of PassKey would interrupt the documents of continuous; "
            f"with the task {MIXED} use packed or by_row",
        )
