"""LogIX: its per-example gradients with `add_lora`, the factored random projection that its documentation recommends, kept in memory."""

import torch
import yaml
from cases import matrix_layers, side
from logix import LogIX
from protocol import Job, Prepared, serve


def gradients(job: Job) -> Prepared:
    layers = matrix_layers(job.model)
    caps = [min(layer.weight.shape[:2]) for layer in layers.values()]
    width = side(job.dim, caps)
    parameters = sum(layer.weight.numel() for layer in layers.values())
    config = job.folder / "config.yaml"
    config.write_text(
        yaml.safe_dump({"root_dir": str(job.folder), "lora": {"init": "random", "rank": width}})
    )
    run = LogIX("bench", str(config))
    run.watch(job.model, name_filter=list(layers))
    run.add_lora()
    run.setup({"grad": ["log"]})
    features = {}

    def one_round() -> None:
        for number, (inputs, labels) in enumerate(job.batches()):
            with run(data_id=list(range(len(inputs)))):
                job.case.losses(job.model(inputs), labels).sum().backward()
            _, log = run.get_log()
            features[number] = torch.cat([one["grad"].flatten(1) for one in log.values()], 1)

    kept = sum(min(width, cap) ** 2 for cap in caps)
    return Prepared(one_round, {"parameters": parameters, "kept": kept})


if __name__ == "__main__":
    serve({"gradients": gradients})
