r"""The paper's 8B model (section 3.1, table 3): 8.6B parameters without embeddings, on 64 chips.

    python -m launch.train --config=configs/fam_8b.py:pretrain --workdir=gs://BUCKET/pretrained \
        --config.data.vocabulary=gs://BUCKET/books.model
    python -m launch.train --config=configs/fam_8b.py --workdir=gs://BUCKET/fam_8b \
        --config.data.vocabulary=gs://BUCKET/books.model --config.train.init_from=gs://BUCKET/pretrained
    python -m launch.plan --config=configs/fam_8b.py --topology=v5p:4x4x4

For the argument, as in `configs/fam_8b.py:bswa,pretrain`, see configs/paper.py.
"""

from ml_collections import ConfigDict

from .paper import paper_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the config of the model in table 3."""
    return paper_config(
        "fam_8b",
        arg,
        model={
            "num_layers": 32,
            "model_dim": 4096,
            "ff_dim": 16384,
            "num_heads": 32,
            "num_kv_heads": 32,
        },
        learning_rate=3e-3,
        mesh={"data": 4, "fsdp": 0},
    )
