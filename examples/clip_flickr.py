"""Which training pairs taught a CLIP what it knows about a photograph? TRAK against neighbours in CLIP space and TracIn, by retraining.

    python examples/clip_flickr.py --quick                    # two minutes: is everything there, and what comes out
    python examples/clip_flickr.py --out clip-report          # the recorded experiment
    python examples/clip_flickr.py --clip transformers:openai/clip-vit-base-patch32 --device cuda

Trains small image and text towers on pairs of Flickr8k, attributes held-out pairs to training pairs (Park et al. 2023, section 5.1), then
removes each target's strongest pairs, trains again without them and measures how far the cosine between the target's image and text falls.
Writes result.json, table.md, table.csv, removal.png and gallery.png. Kill it whenever you like: the same command goes on where it
stopped.

Needs flickr8k_64px.npz and flickr8k_captions.json.gz (--data), Pillow and matplotlib; with --clip also transformers or open_clip, and the
weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import clip_results
import torch
from clip_data import Pairs, read_pairs, split
from clip_stages import (
    SNAPSHOTS,
    Clock,
    Retrain,
    attribute,
    choose_targets,
    collect,
    gallery,
    look_at,
    remove,
    shared_rows,
    train_checkpoints,
    train_controls,
)
from clip_towers import Family, Recipe, SmallTowers

import trak

QUICK = {
    "train": 3000,
    "held_out": 200,
    "checkpoints": 2,
    "targets": 4,
    "k": [150],
    "seeds": 1,
    "controls": 3,
    "dim": 1024,
}


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "trak": trak.__version__,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def build_family(train: Pairs, held_out: Pairs, options: argparse.Namespace) -> Family:
    if options.clip is None:
        return SmallTowers(train, held_out, Recipe(epochs=options.epochs or Recipe.epochs))
    from clip_pretrained import FineTuning, load

    recipe = FineTuning(epochs=options.epochs or FineTuning.epochs)
    return load(options.clip, train, held_out, recipe, device=options.device)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All stages; what an earlier run has finished is read."""
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.out / "seconds.txt")
    train, held_out = split(read_pairs(options.data, options.captions), options.train, options.held_out)
    family = build_family(train, held_out, options)

    print(f"1/4 Checkpoints: {options.checkpoints} models on {options.train:,} pairs", flush=True)
    checkpoints = train_checkpoints(family, clock, options)
    similarity_NH, aligned_H, quality = look_at(family, checkpoints)
    chosen = choose_targets(aligned_H, options.targets)

    print("2/4 Attribution", flush=True)
    attributions = attribute(family, checkpoints, options)
    scores = {name: one.scores.tensor() for name, one in attributions.items()}
    scores["CLIP similarity"] = similarity_NH
    blocks = gallery(train, held_out, chosen[: options.shown], similarity_NH, attributions["TRAK"])
    clip_results.draw_gallery(blocks, options.out / "gallery.png")

    again = Retrain(family, clock)
    print(f"3/4 Controls: {options.controls * (1 + len(options.k))} models", flush=True)
    controls = train_controls(family, again, options)
    print(f"4/4 Without the strongest pairs of {len(chosen)} targets", flush=True)
    removed = remove(again, scores, chosen, family, options)
    return {
        "model": options.clip or "small towers",
        "version": json.loads(family.version),
        "sizes": {
            "train": options.train,
            "held_out": options.held_out,
            "parameters": attributions["TRAK"].info["attributed_parameters"],
            "projection": attributions["TRAK"].info["projection_dimension"],
            "negatives": options.negatives,
        },
        "models": {
            "checkpoints": options.checkpoints,
            "trajectories": options.trajectories,
            "snapshots": SNAPSHOTS,
            "controls": options.controls + options.seeds,
            "random": options.controls,
            "seeds": options.seeds,
            "trainings": options.checkpoints
            + len(controls.masks)
            + options.seeds * (1 + len(scores) * len(chosen) * len(removed.k)),
        },
        "held_out": quality,
        "targets": [held_out.names[row] for row in chosen],
        **collect(controls, removed),
        "shared_with_trak": {str(k): shared_rows(scores, chosen, k) for k in removed.k},
        "training_cpu_seconds": clock.total(),
        "machine": machine(),
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    add(
        "--out",
        type=Path,
        default=None,
        help="folder of everything that is written [clip-report, clip-quick]",
    )
    add("--data", type=Path, default=beside, help="folder with the photographs and captions [%(default)s]")
    add("--quick", action="store_true", help="small sizes, about two minutes: " + ", ".join(QUICK))
    add(
        "--clip",
        metavar="LIBRARY:NAME",
        help="fine-tune a real CLIP: transformers:NAME or open_clip:MODEL/WEIGHTS",
    )
    add("--device", help="where --clip computes [CUDA where there is one, else the CPU]")
    sizes: dict[str, tuple[Any, str]] = {
        "train": (5000, "training pairs, N"),
        "held-out": (500, "pairs that are attributed and measured"),
        "captions": (5, "of the five, that make a pair's text"),
        "checkpoints": (5, "models to attribute"),
        "trajectories": (2, "of them whose snapshots along training TracIn sums over"),
        "targets": (16, "pairs whose strongest training pairs are removed"),
        "seeds": (2, "models for each set of removed pairs"),
        "controls": (6, "models on all pairs, and as many for each k on all but random ones"),
        "negatives": (500, "training pairs from which each pair is told, in f"),
        "shown": (4, "targets in gallery.png"),
        "batch-size": (100, "of attribution"),
    }
    for name, (default, text) in sizes.items():
        add(f"--{name}", type=int, default=None, help=f"{text} [{default}]")
    add("--k", type=int, nargs="+", help="how many pairs are removed [50 250]")
    add("--epochs", type=int, help="passes over the training pairs [6; of fine-tuning 3]")
    add("--dim", type=int, help="of the sparse projection [4096]")
    add("--threads", type=int, default=1, help="of torch [%(default)s]")
    add(
        "--page",
        action="store_true",
        help=f"only write {clip_results.PAGE.name} and its figure from the recorded result",
    )
    options = parser.parse_args(arguments)
    defaults = {name.replace("-", "_"): default for name, (default, _) in sizes.items()}
    defaults |= {"k": [50, 250], "dim": 4096}
    for name, default in (defaults | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.k = sorted(set(options.k))
    options.out = options.out or Path("clip-quick" if options.quick else "clip-report")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    if options.page:
        clip_results.write_page()
        return
    torch.set_num_threads(options.threads)
    result = run(options)
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "table.md").write_text(clip_results.markdown_table(result) + "\n")
    (options.out / "table.csv").write_text(clip_results.csv_table(result))
    clip_results.draw(result, options.out / "removal.png")
    print(f"\n{clip_results.facts(result)}\n\n{clip_results.markdown_table(result)}")
    print(f"\nWrote result.json, table.md, table.csv, removal.png and gallery.png to {options.out}")


if __name__ == "__main__":
    main()
