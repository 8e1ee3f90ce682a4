"""How much damping? LDS and mislabel detection on the demo's bank of retrained models, over a sweep of shares s in λ = trace / s.

trak demo --out demo-report                # trains the bank, once
python examples/damping.py --out demo-report --dims 1024 4096 --checkpoints 1 10
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import trak
from trak.demo.bank import train_bank
from trak.demo.data import load_data
from trak.demo.recipe import build_model
from trak.demo.settings import full_settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="the demo's folder")
    parser.add_argument("--dims", type=int, nargs="+", default=[1024])
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--shares", type=float, nargs="+", default=[30, 100, 300, 1e3, 3e3, 1e4, 1e5])
    options = parser.parse_args()

    settings = full_settings(0)
    data = load_data(corrupted_share=settings.corrupted_share, seed=settings.derived_seed("corruption"))
    bank = train_bank(data, settings, options.out)
    print(f"{'K':>6} {'M':>3} {'share':>8}  LDS    AUC of self-influence")
    for dim, size, share in itertools.product(options.dims, options.checkpoints, options.shares):
        attribution = trak.attribute(
            build_model(settings.recipe),
            (data.images, data.labels),
            (data.test_images, data.test_labels),
            task="image_classification",
            checkpoints=bank.checkpoint_files[:size],
            projection=trak.Sparse(dim=dim),
            damping=trak.AutomaticDamping(share=share / size**0.5, directions=None),  # λ = trace / share
            save_dir=options.out / f"damping-{dim}",
            batch_size=100,
        )
        lds = trak.evaluation.lds(attribution.scores, bank.subset_masks, bank.subset_outputs)
        found = trak.evaluation.mislabel_curve(attribution.self_influence(), data.corrupted)
        print(f"{dim:6d} {size:3d} {share:8.0f}  {lds.mean:.3f}  {found.auc:.3f}", flush=True)


if __name__ == "__main__":
    main()
