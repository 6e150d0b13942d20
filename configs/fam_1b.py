r"""The paper's 1B model (section 3.1, table 3): 1.19B parameters without embeddings, on 32 chips.

    python -m launch.train --config=configs/fam_1b.py:pretrain --workdir=gs://BUCKET/pretrained \
        --config.data.vocabulary=gs://BUCKET/books.model
    python -m launch.train --config=configs/fam_1b.py --workdir=gs://BUCKET/fam_1b \
        --config.data.vocabulary=gs://BUCKET/books.model --config.train.init_from=gs://BUCKET/pretrained
    python -m launch.plan --config=configs/fam_1b.py --topology=v5p:2x4x4

For the argument, as in `configs/fam_1b.py:bswa,pretrain`, see configs/paper.py.
"""

from ml_collections import ConfigDict

from .paper import paper_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the config of the model in table 3."""
    return paper_config(
        "fam_1b",
        arg,
        model={
            "num_layers": 18,
            "model_dim": 1536,
            "ff_dim": 12288,
            "num_heads": 12,
            "num_kv_heads": 12,
        },
        learning_rate=1e-4,
        mesh={"data": 2, "fsdp": 0},
    )
