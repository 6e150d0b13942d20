r"""The paper's 24B model (section 3.1, table 3): 24.5B parameters without embeddings, on 128 chips.

    python -m launch.train --config=configs/fam_24b.py:pretrain --workdir=gs://BUCKET/pretrained \
        --config.data.vocabulary=gs://BUCKET/books.model
    python -m launch.train --config=configs/fam_24b.py --workdir=gs://BUCKET/fam_24b \
        --config.data.vocabulary=gs://BUCKET/books.model --config.train.init_from=gs://BUCKET/pretrained
    python -m launch.plan --config=configs/fam_24b.py --topology=v5p:4x4x8

For the argument, as in `configs/fam_24b.py:bswa,pretrain`, see configs/paper.py.
"""

from ml_collections import ConfigDict

from .paper import paper_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the config of the model in table 3."""
    return paper_config(
        "fam_24b",
        arg,
        model={
            "num_layers": 56,
            "model_dim": 4096,
            "ff_dim": 32768,
            "num_heads": 32,
            "num_kv_heads": 1,
            # The activations that "dots" keeps do not fit a v5p chip.
            "remat": "wide",
        },
        learning_rate=3e-3,
        mesh={"data": 4, "fsdp": 0},
    )
