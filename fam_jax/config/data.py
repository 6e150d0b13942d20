"""The data group of a config: its fields, and which of them belong to which task."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on. PassKey examples (section 3.2) are a key, filler, the question; all else is packed."""

    # passkey | text | text+passkey: batches of either | seqio:NAME, a task or mixture that `imports` registers
    task: str = "passkey"
    vocabulary: str = "passkey"  # passkey (shipped) | bytes | path of a SentencePiece model or tokenizer.json
    add_bos: bool = False  # a text begins with the vocabulary's start token, as most open models were trained
    # PassKey: lengths in blocks of the model.
    digits: int = 5
    stage_blocks: tuple[int, ...] = (2, 3, 4, 6, 9, 13, 18)  # filler length of each curriculum stage
    min_filler_blocks: int = (
        1  # filler of the first stage starts above this; of later ones, above the stage before
    )
    filler_step: int = 1  # fillers are multiples of so many tokens; divides model.block_size
    advance_accuracy: float = 0.8  # running exact match at which the next stage begins
    max_stage_steps: int = 0  # the next stage begins after so many steps all the same; 0 = never
    longest_fraction: float = 0.5  # of batches at the current stage; the rest from earlier stages
    prompt_weight: float = 0.01  # loss weight of all tokens but the answer, whose weight is 1
    # Text and seqio: examples are joined, and cut into rows of one length.
    sequence_length: int = 1024  # T, tokens; the last block of a row may be short
    shuffle_batches: int = 8  # rows are shuffled within groups of so many batches
    repeat_segment: int = 0  # tokens of a row that it has to repeat at its end (section 3.1); 0 = off
    repeat_weight: float = 0.1  # loss weight of the repetition
    # Text: files (*.jsonl: a document per line, under "text"), folders, patterns, or tfds:NAME:SPLIT.
    train_files: tuple[str, ...] = ()
    heldout_files: tuple[str, ...] = ()  # for evaluation
    file_suffixes: tuple[str, ...] = (".txt",)  # files that count in a folder
    imports: tuple[str, ...] = ()  # seqio: modules to import
    # Text and PassKey in turns, drawn at random.
    passkey_fraction: float = 0.5  # of batches that are PassKey's; the others are text
    last_stage_passkey_fraction: float = 0.0  # the same from the curriculum's last stage on; 0 = no other


# Fields that one kind of task reads; under others they must stay at their defaults.
TASK_FIELDS = {
    "passkey": ("digits", "stage_blocks", "min_filler_blocks", "filler_step", "advance_accuracy", "max_stage_steps",
                "longest_fraction", "prompt_weight"),
    "text": ("train_files", "heldout_files", "file_suffixes"),
    "seqio": ("imports",),
    "text or seqio": ("sequence_length", "shuffle_batches", "repeat_segment", "repeat_weight"),
    "passkey or text": ("vocabulary",),
    "passkey or text or seqio": ("add_bos",),
    "text+passkey": ("passkey_fraction", "last_stage_passkey_fraction"),
}  # fmt: skip


def task_mistake(data: DataConfig) -> str:
    """What is wrong with the choice of task, beginning with the field's name; empty if nothing is."""
    kind, _, name = data.task.partition(":")
    if data.task not in ("passkey", "text", "text+passkey") and not (kind == "seqio" and name):
        return f"task: expected passkey, text, text+passkey or seqio:NAME, got {data.task!r}"
    parts = {kind, *kind.split("+")}
    for kinds, fields in TASK_FIELDS.items():
        for field in fields:
            if not parts & {*kinds.split(" or ")} and getattr(data, field) != getattr(DataConfig, field):
                return f"{field}: belongs to the task {kinds}, but data.task is {data.task}; leave it at its default"
    if "text" in parts and not data.train_files:
        return f"train_files: the task {data.task} needs files to train on"
    if "text" in parts and data.vocabulary == "passkey":
        return (
            "vocabulary: passkey has the words of its own task only; "
            "for text set bytes or the path of a SentencePiece model"
        )
    return ""
