r"""ResNet-50 on ImageNet at 90 % sparsity, 90 epochs: RigL with SGD beside RigL with SparseOpt.

    python -m experiments.prepare --dataset=imagenet2012 --data_dir=DIR --manual_dir=TARS
    python -m experiments.train --config=experiments/configs/imagenet_resnet50.py \
        --config.data_dir=DIR

With images of your own, in DIR/train/CLASS and DIR/val/CLASS: --config.dataset=folder, with nothing
to prepare. Where they are few, the answer names all that has to change, and a command that works.

Not run yet. The paper (arXiv 2605.27541) reports 73.88 % top-1 test accuracy for the baseline and
74.41 % for SparseOpt, and says which model, data, sparsity, topology and number of epochs. Batch
size, learning rate, update interval, drop fraction and distribution are in no text that we have.
They are taken from RigL's ImageNet runs: batches of 4,096 images, a learning rate of 1.6 after 5
epochs of warm-up, weight decay 1e-4, label smoothing 0.1, Nesterov momentum 0.9, ERK, an update
every 100 steps, the first of which moves 30 % of a layer's active weights.

Ours are the cosine decay of the learning rate (RigL's falls in steps; the paper's curves show
none), the end of the updates after three quarters of the run (RigL's is step 25,000 of 32,000), and
bfloat16 for the model's computation.

`python -m experiments.compile_check --topology=v5e:4x4` compiles it for TPUs that are not there.
"""

from experiments.config import Config


def get_config() -> Config:
    """ResNet-50 on ImageNet: two methods, one seed each."""
    return Config(
        dataset="imagenet2012",
        data_dir="data",
        model="resnet50",
        dtype="bfloat16",
        sparsity=0.9,
        distribution="erk",
        topology="rigl",
        update_interval=100,
        drop_fraction=0.3,
        update_end=0.75,
        optimizer="sparseopt",
        learning_rate=1.6,
        schedule="cosine",
        warmup_epochs=5,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        label_smoothing=0.1,
        epochs=90,
        batch_size=4096,
        compare=("sgd", "sparseopt"),
        log_every=50,
    )
